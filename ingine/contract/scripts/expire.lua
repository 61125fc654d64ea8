-- Read whether a job is to be ended, since its deadline has passed and no worker runs it; or end it.
--
-- KEYS  1..3 jobs streams: high, normal, low  4 job hash  5 deadlines
--       to end it also: 6 token log  7 delayed  8 bytes of the queue  9 replies stream  10 idempotency key
-- ARGV  1 group  2 job id  3 to read: most bytes of the job to return; to end it: ''
--       to end it also: 4 position  5 terminal event at that position  6 channel  7 result TTL in ms
--       8 1: send a reply to KEYS[9]  9 1: the job has the idempotency key of KEYS[10]
-- returns {'due', position, attempt, submitted_at, deadline_at, reply_to, idempotency key, job, or '' where it
--          has more bytes}   only read: the job is to be ended
--       | {the status in which the job has ended}, by this call or before
--       | {'early'}    its deadline has not passed, or it has none
--       | {'running'}  a worker runs it, and ends it itself
--       | {'moved'}    it is at another position: read it again
--       | {'unknown'}  it has no record
--       | {'broken'}   its keys hold values of another type, or its position is no number
--
-- The score in `deadlines` is the time at which to read the job; its deadline is in its record. After every call the
-- job is removed from `deadlines` or has a score in the future, so that it hides no other job that is due. To read a
-- job reserves it for a while, so that not all workers read the same jobs.

-- include: count.lua
-- include: refusals.lua
-- include: end_job.lua

local READ_AGAIN_MS = 5000 -- if the process that has read it does not end it
local DEFAULT_LEASE_MS, LONGEST_LEASE_MS = 600000, 86400000 -- the default is for a record without a lease

-- Any client may have written the field, at any length.
local function short(text)
  return text and #text <= 1024 and text or ''
end

local function later(ms)
  redis.call('ZADD', KEYS[5], 'XX', string.format('%d', ms), ARGV[2])
end

local function never(answer)
  redis.call('ZREM', KEYS[5], ARGV[2])
  return {answer}
end

local record = redis.pcall('HMGET', KEYS[4], 'status', 'position', 'deadline_at', 'priority', 'entry', 'worker',
  'lease_ms', 'attempt', 'submitted_at', 'reply_to', 'idempotency_key')
if record.err then
  return never('broken')
end
local status, position, entry, worker = record[1], record[2], record[5], record[6]
if status ~= 'delayed' and status ~= 'queued' and status ~= 'running' then
  return never(status or 'unknown')
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local deadline_at = count(record[3])
if not deadline_at then
  return never('early')
elseif deadline_at > now then
  later(deadline_at)
  return {'early'}
end

local priority = ({high = 1, normal = 2, low = 3})[record[4]] or 2
local jobs = KEYS[priority]
if status == 'running' and entry then
  local lease_ms = math.min(count(record[7]) or DEFAULT_LEASE_MS, LONGEST_LEASE_MS)
  local pending = redis.pcall('XPENDING', jobs, ARGV[1], entry, entry, 1)[1]
  if pending and pending[2] == worker and pending[3] <= lease_ms then
    later(now + math.max(1, lease_ms))
    return {'running'}
  end
end
if not count(position) then
  return never('broken')
end

if ARGV[3] ~= '' then
  later(now + READ_AGAIN_MS)
  local job = ''
  if status == 'delayed' then
    job = redis.call('HGET', KEYS[4], 'raw') or ''
  else
    local found = entry and redis.pcall('XRANGE', jobs, entry, entry)[1]
    for i = 1, found and #found[2] or 0, 2 do
      if found[2][i] == 'job' then
        job = found[2][i + 1]
      end
    end
  end
  return {'due', position, count(record[8]) and record[8] or '0', count(record[9]) and record[9] or '', record[3],
    short(record[10]), short(record[11]),
    #job <= tonumber(ARGV[3]) and job or ''}
end

if position ~= ARGV[4] then
  return {'moved'}
end
local failed = end_job(
  {job = KEYS[4], log = KEYS[6], deadlines = KEYS[5], bytes = KEYS[8], replies = KEYS[9], idempotency = KEYS[10]},
  {
    job_id = ARGV[2], status = 'expired', position = ARGV[4], event = ARGV[5], channel = ARGV[6], ttl_ms = ARGV[7],
    has_reply = ARGV[8], has_key = ARGV[9],
  }
)
if failed then
  return never_passes(failed) and never('broken') or failed
end
-- The job has ended: no command may fail any more. Clear the worker, or the holder whose lease has run out would take
-- this end for its own.
redis.call('HSET', KEYS[4], 'worker', '')
if status == 'delayed' then
  redis.pcall('ZREM', KEYS[7], ARGV[2])
elseif entry then
  redis.pcall('XACK', jobs, ARGV[1], entry)
  redis.pcall('XDEL', jobs, entry)
end
return {'expired'}
