-- Cancel a job: at once if no worker has begun it, else by a flag that its worker reads at its next step.
--
-- KEYS  1 job hash  2 token log  3..5 jobs streams: high, normal, low  6 delayed  7 bytes of the queue
--       8 deadlines  9 replies stream  10 idempotency key
-- ARGV  1 group  2 terminal event at position 0  3 channel  4 result TTL in ms  5 1: send a reply to KEYS[9]
--       6 control channel  7 the nudge to publish there  8 job id  9 1: the job has the idempotency key of KEYS[10]
--       10 entry and 11 priority (only for a job without a record, which was added by a bare XADD)
-- returns 'cancelled' | 'requested' | 'unknown' | the status in which the job had ended before

-- include: count.lua
-- include: end_job.lua

local streams = {high = KEYS[3], normal = KEYS[4], low = KEYS[5]}
local record = redis.call('HMGET', KEYS[1], 'status', 'position', 'priority', 'entry')
local status, position = record[1], record[2]
if not status and ARGV[10] and redis.call('XRANGE', streams[ARGV[11]], ARGV[10], ARGV[10])[1] then
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local submitted_at = math.min(now, tonumber(string.match(ARGV[10], '^%d+')))
  redis.call('HSET', KEYS[1], 'position', 0, 'entry', ARGV[10], 'priority', ARGV[11],
    'submitted_at', string.format('%d', submitted_at))
  status, position, record[3], record[4] = 'queued', '0', ARGV[11], ARGV[10]
end
if not status then
  return 'unknown'
end
if status ~= 'queued' and status ~= 'running' and status ~= 'delayed' then
  return status
end

if status ~= 'running' and position == '0' then
  local failed = end_job(
    {job = KEYS[1], log = KEYS[2], deadlines = KEYS[8], bytes = KEYS[7], replies = KEYS[9], idempotency = KEYS[10]},
    {
      job_id = ARGV[8], status = 'cancelled', position = 0, event = ARGV[2], channel = ARGV[3], ttl_ms = ARGV[4],
      has_reply = ARGV[5], has_key = ARGV[9],
    }
  )
  if failed then
    return failed
  end
  -- The job has ended. From here on no command may fail, whatever the other keys hold.
  redis.pcall('ZREM', KEYS[6], ARGV[8])
  if status == 'queued' and record[4] then
    redis.pcall('XACK', streams[record[3]] or KEYS[4], ARGV[1], record[4])
    redis.pcall('XDEL', streams[record[3]] or KEYS[4], record[4])
  end
  return 'cancelled'
end

-- The job has been begun: tokens are in its log, and only the holder of an attempt may append to it.
redis.call('HSET', KEYS[1], 'cancel', 1)
if status == 'delayed' then
  redis.pcall('ZADD', KEYS[6], 0, ARGV[8])
end
redis.call('SPUBLISH', ARGV[6], ARGV[7])
return 'requested'
