-- Cancel a job: at once if no worker has begun it, else by a flag that its worker obeys at its next step.
--
-- KEYS  1 job hash  2 token log  3..5 jobs streams: high, normal, low  6 replies stream (only where ARGV[5] is 1)
-- ARGV  1 group  2 terminal event at position 0  3 channel  4 result TTL in ms  5 1 if the job has a reply_to
--       6 control channel  7 the nudge to publish there
-- returns 'cancelled' | 'requested' | 'unknown' | the status in which the job has ended already

local record = redis.call('HMGET', KEYS[1], 'status', 'position', 'priority', 'entry')
local status = record[1]
if not status then
  return 'unknown'
end
if status ~= 'queued' and status ~= 'running' then
  return status
end

if status == 'queued' and record[2] == '0' then
  local streams = {high = KEYS[3], normal = KEYS[4], low = KEYS[5]}
  local jobs = streams[record[3]]
  redis.call('XADD', KEYS[2], '0-1', 'event', ARGV[2])
  redis.call('XACK', jobs, ARGV[1], record[4])
  redis.call('XDEL', jobs, record[4])
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'status', 'cancelled',
    'finished_at', now[1] * 1000 + math.floor(now[2] / 1000))
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
  redis.call('PEXPIRE', KEYS[2], ARGV[4])
  if ARGV[5] == '1' then
    redis.call('XADD', KEYS[6], '*', 'event', ARGV[2])
    redis.call('PEXPIRE', KEYS[6], ARGV[4])
  end
  redis.call('PUBLISH', ARGV[3], ARGV[2])
  return 'cancelled'
end

-- Begun before: tokens are in the log, and only the holder of an attempt may write behind them.
redis.call('HSET', KEYS[1], 'cancel', 1)
redis.call('PUBLISH', ARGV[6], ARGV[7])
return 'requested'
