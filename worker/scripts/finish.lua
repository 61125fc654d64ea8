-- End a job: terminal event, record, reply, ack, delete and TTLs, all or nothing.
--
-- KEYS  1 jobs stream  2 job hash  3 token log  4 bytes of the queue  5 dead letters
--       6 replies stream (only where ARGV[9] is 1)
-- ARGV  1 group  2 entry  3 attempt  4 position  5 status  6 event  7 channel  8 result TTL in ms
--       9 1: send a reply  10 worker  11 code and 12 reason of a copy for the dead letters, or ''
-- returns a number, as append does: position: ended; another n >= 0: the log ends at n; -1: stale

local record = redis.call('HMGET', KEYS[2], 'status', 'attempt', 'position', 'worker', 'bytes')
if record[2] ~= ARGV[3] or record[4] ~= ARGV[10] then
  return -1
end
if record[1] ~= 'running' then
  -- Ended by an earlier call whose reply was lost; anything else is another's business.
  return record[1] == ARGV[5] and tonumber(record[3]) or -1
end
if record[3] ~= ARGV[4] then
  return tonumber(record[3])
end

if ARGV[11] ~= '' then
  for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])) do
    local job = ''
    for i = 1, #entry[2], 2 do
      job = entry[2][i] == 'job' and entry[2][i + 1] or job
    end
    redis.call('XADD', KEYS[5], '*', 'job', job, 'code', ARGV[11], 'reason', ARGV[12], 'stream', KEYS[1],
      'entry', ARGV[2], 'deliveries', record[2], 'worker', ARGV[10])
  end
end
redis.call('XADD', KEYS[3], ARGV[4] .. '-1', 'event', ARGV[6])
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
local now = redis.call('TIME')
redis.call('HSET', KEYS[2], 'status', ARGV[5], 'finished_at', now[1] * 1000 + math.floor(now[2] / 1000))
redis.call('PEXPIRE', KEYS[2], ARGV[8])
redis.call('PEXPIRE', KEYS[3], ARGV[8])
if record[5] and redis.call('DECRBY', KEYS[4], record[5]) <= 0 then
  redis.call('DEL', KEYS[4])
end
if ARGV[9] == '1' then
  -- Others' replies lie there too: its time to live never gets shorter.
  local ttl = redis.call('PTTL', KEYS[6])
  redis.call('XADD', KEYS[6], '*', 'event', ARGV[6])
  redis.call('PEXPIRE', KEYS[6], math.max(ttl, tonumber(ARGV[8])))
end
redis.call('SPUBLISH', ARGV[7], ARGV[6])
return tonumber(ARGV[4])
