-- Hand over a job in the middle of its generation. It keeps its place, its log and its entry.
--
-- KEYS  1 jobs stream  2 job hash
-- ARGV  1 group  2 worker  3 entry  4 attempt, or 0 for an entry that does not run here  5 consumer of released entries
-- returns 1, or 0 where the job is not ours any more
--
-- The entry becomes pending with the consumer `released`, with a very long idle time: the next sweep of any worker
-- claims it, ahead of all jobs submitted later. A new entry would move a half generated answer to the queue's end.

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
  -- We may have begun the job, if the reply of `begin` was lost. The next `begin` must not count that as a death.
  local record = redis.pcall('HMGET', KEYS[2], 'status', 'worker', 'entry')
  if not record.err and record[1] == 'running' and record[2] == ARGV[2] and record[3] == ARGV[3] then
    redis.call('HSET', KEYS[2], 'status', 'queued', 'worker', '')
  end
end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[5], 0, ARGV[3], 'IDLE', 1000000000, 'JUSTID')
return 1
