-- Hand a job over now, mid-generation: it keeps its place, its log and its entry.
--
-- KEYS  1 jobs stream  2 job hash
-- ARGV  1 group  2 worker  3 entry  4 attempt, or 0 for an entry that does not run here  5 consumer of what is released
-- returns 1, or 0 where the job is not ours any more
--
-- The entry goes to the consumer `released`, idle since ever: the next sweep of any worker claims it, ahead of
-- whatever was submitted later. Adding it anew would put half-told answers behind the whole queue.

local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if not pending[1] or pending[1][2] ~= ARGV[2] then
  return 0
end
if ARGV[4] ~= '0' then
  local record = redis.call('HMGET', KEYS[2], 'status', 'attempt', 'worker')
  if record[1] ~= 'running' or record[2] ~= ARGV[4] or record[3] ~= ARGV[2] then
    return 0
  end
  redis.call('HSET', KEYS[2], 'status', 'queued', 'worker', '')
else
  -- Begun by us all the same, where the reply of that call was lost: the next `begin` must not count a death.
  local record = redis.pcall('HMGET', KEYS[2], 'status', 'worker', 'entry')
  if not record.err and record[1] == 'running' and record[2] == ARGV[2] and record[3] == ARGV[3] then
    redis.call('HSET', KEYS[2], 'status', 'queued', 'worker', '')
  end
end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[5], 0, ARGV[3], 'IDLE', 1000000000, 'JUSTID')
return 1
