-- End a job whose deadline has passed, if nobody runs it.
--
-- KEYS  1..3 jobs streams: high, normal, low  4 job hash  5 token log  6 delayed  7 deadlines  8 bytes of the queue
--       9 replies stream  10 idempotency key
-- ARGV  1 group  2 job id  3 position  4 terminal event at that position  5 channel  6 result TTL in ms
--       7 1: send a reply to KEYS[9]  8 1: the job has the idempotency key of KEYS[10]
-- returns the status in which the job has ended, by this call or before
--       | 'early'    its deadline has not passed, or it has none
--       | 'running'  a worker runs it, and ends it itself
--       | 'moved'    it is at another position: read the record again
--       | 'unknown'  it has no record
--       | 'broken'   something else lies under its keys
--
-- The score in `deadlines` says when to look at the job; when it expires is in its record.

-- include: end_job.lua

local WITHOUT_LEASE_MS = 600000 -- of an attempt whose worker has not said how long its lease is

local record = redis.pcall('HMGET', KEYS[4],
  'status', 'position', 'deadline_at', 'priority', 'entry', 'worker', 'lease_ms')
if record.err then
  redis.call('ZREM', KEYS[7], ARGV[2])
  return 'broken'
end
local status, entry, worker = record[1], record[5], record[6]
if status ~= 'delayed' and status ~= 'queued' and status ~= 'running' then
  redis.call('ZREM', KEYS[7], ARGV[2])
  return status or 'unknown'
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local deadline_at = tonumber(record[3])
if not deadline_at then
  redis.call('ZREM', KEYS[7], ARGV[2])
  return 'early'
elseif deadline_at > now then
  redis.call('ZADD', KEYS[7], 'XX', record[3], ARGV[2])
  return 'early'
end

local jobs = ({high = KEYS[1], normal = KEYS[2], low = KEYS[3]})[record[4]] or KEYS[2]
if status == 'running' then
  local lease_ms = tonumber(record[7]) or WITHOUT_LEASE_MS
  local pending = redis.pcall('XPENDING', jobs, ARGV[1], entry, entry, 1)[1]
  if pending and pending[2] == worker and pending[3] <= lease_ms then
    redis.call('ZADD', KEYS[7], 'XX', string.format('%d', now + lease_ms), ARGV[2])
    return 'running'
  end
end
if record[2] ~= ARGV[3] then
  return 'moved'
end

local failed = end_job(
  {job = KEYS[4], log = KEYS[5], deadlines = KEYS[7], bytes = KEYS[8], replies = KEYS[9], idempotency = KEYS[10]},
  {
    job_id = ARGV[2], status = 'expired', position = ARGV[3], event = ARGV[4], channel = ARGV[5], ttl_ms = ARGV[6],
    has_reply = ARGV[7], has_key = ARGV[8],
  }
)
if failed then
  local why = tostring(failed.err)
  if string.find(why, 'WRONGTYPE', 1, true) or string.find(why, 'smaller than', 1, true) then
    redis.call('ZREM', KEYS[7], ARGV[2])
    return 'broken'
  end
  return failed
end
-- Or the holder whose lease has run out would take this for its own ending.
redis.call('HSET', KEYS[4], 'worker', '')
if status == 'delayed' then
  redis.call('ZREM', KEYS[6], ARGV[2])
else
  redis.pcall('XACK', jobs, ARGV[1], entry)
  redis.call('XDEL', jobs, entry)
end
return 'expired'
