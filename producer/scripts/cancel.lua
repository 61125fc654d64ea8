-- Cancel a job: at once if no worker has begun it, else by a flag that its worker obeys at its next step.
--
-- KEYS  1 job hash  2 token log  3..5 jobs streams: high, normal, low  6 delayed  7 bytes of the queue
--       8 replies stream (only where ARGV[5] is 1)
-- ARGV  1 group  2 terminal event at position 0  3 channel  4 result TTL in ms  5 1 if the job has a reply_to
--       6 control channel  7 the nudge to publish there  8 job id
-- returns 'cancelled' | 'requested' | 'unknown' | the status in which the job has ended already

local record = redis.call('HMGET', KEYS[1], 'status', 'position', 'priority', 'entry', 'bytes')
local status, position = record[1], record[2]
if not status then
  return 'unknown'
end
if status ~= 'queued' and status ~= 'running' and status ~= 'delayed' then
  return status
end

if status ~= 'running' and position == '0' then
  local streams = {high = KEYS[3], normal = KEYS[4], low = KEYS[5]}
  local jobs = streams[record[3]]
  redis.call('XADD', KEYS[2], '0-1', 'event', ARGV[2])
  redis.call('ZREM', KEYS[6], ARGV[8])
  if status == 'queued' then
    redis.call('XACK', jobs, ARGV[1], record[4])
    redis.call('XDEL', jobs, record[4])
  end
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'status', 'cancelled',
    'finished_at', now[1] * 1000 + math.floor(now[2] / 1000))
  redis.call('HDEL', KEYS[1], 'raw')
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
  redis.call('PEXPIRE', KEYS[2], ARGV[4])
  if record[5] and redis.call('DECRBY', KEYS[7], record[5]) <= 0 then
    redis.call('DEL', KEYS[7])
  end
  if ARGV[5] == '1' then
    -- Others' replies lie there too: its time to live never gets shorter.
    local ttl = redis.call('PTTL', KEYS[8])
    redis.call('XADD', KEYS[8], '*', 'event', ARGV[2])
    redis.call('PEXPIRE', KEYS[8], math.max(ttl, tonumber(ARGV[4])))
  end
  redis.call('SPUBLISH', ARGV[3], ARGV[2])
  return 'cancelled'
end

-- Begun before: tokens are in the log, and only the holder of an attempt may write behind them.
redis.call('HSET', KEYS[1], 'cancel', 1)
if status == 'delayed' then
  redis.call('ZADD', KEYS[6], 0, ARGV[8])
end
redis.call('SPUBLISH', ARGV[6], ARGV[7])
return 'requested'
