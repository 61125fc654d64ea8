-- Submit one job: check limits, idempotency key and job id, add its entry, and create its record. All or nothing.
--
-- KEYS  1 job hash  2 queue settings  3 the jobs stream of this priority  4..6 all three jobs streams  7 delayed
--       8 bytes of the queue  9 rate of this tenant  10 deadlines  11 idempotency key
--       12 job hash of ARGV[16] (only if that is given)
-- ARGV  1 job id  2 msgpack job  3 priority  4 submission (a nonce)  5 reply_to or ''
--       6 idempotency key or ''  7 default max_jobs  8 default max_job_bytes
--       9 default max_bytes  10 number of partitions that the producer knows  11 tenant or ''
--       12 cost in tokens  13 delay in ms  14 most bytes of a job, whatever the settings say
--       15 deadline in ms from now, 0: none  16 the job that an earlier `same` named, or ''
--       17 number of choices (absent: 1)
-- returns {'accepted', job id} | {'same', job id}       same: that job was submitted before with this idempotency key
--       | {'partitions', number}                        the present number of partitions: the job belongs elsewhere
--       | {'duplicate', ''} | {'full', max_jobs} | {'full_bytes', max_bytes} | {'too_large', max_job_bytes}
--       | {'rate', ms to wait}
--
-- A client library may send a script again when a reply is lost. The nonce makes that harmless: the second call finds
-- its own submission and returns the same reply.
--
-- An idempotency key is kept as long as its job, and then as long as the job's result. If the record is lost earlier
-- (deleted by hand, or evicted), the key has no effect any more. Which record to check is known only after the first
-- reply: send the submission again with the job that `same` named, and that reply is final.

-- Any client may write settings and counters. A value that is no positive number counts as not set, as in workers.
local function positive(text)
  local number = text and string.match(text, '^[%d.]+[eE]?[+-]?%d*$') and tonumber(text)
  return number and number > 0 and number < math.huge and number
end

-- 0 if a client has put another type under the key: the other keys still count.
local function length(command, key)
  local number = redis.pcall(command, key)
  return type(number) == 'number' and number or 0
end

local function read(key)
  local text = redis.pcall('GET', key)
  return type(text) == 'string' and positive(text) or 0
end

local LONGEST_APART_MS = 1e12

-- A job of one choice has no such field, in its entry or its record.
local fields = {'tenant', ARGV[11], 'cost', ARGV[12]}
if (ARGV[17] or '1') ~= '1' then
  fields[5], fields[6] = 'choices', ARGV[17]
end

local settings = redis.call('HMGET', KEYS[2],
  'partitions', 'max_jobs', 'max_job_bytes', 'max_bytes', 'max_jobs_per_s')
local partitions = settings[1] or '1'
if partitions ~= ARGV[10] then
  return {'partitions', partitions}
end
if redis.call('HGET', KEYS[1], 'submission') == ARGV[4] then
  return {'accepted', ARGV[1]}
end
if ARGV[6] ~= '' then
  local job_id = redis.call('GET', KEYS[11])
  if job_id and not (job_id == ARGV[16] and redis.call('EXISTS', KEYS[12]) == 0) then
    -- A key expires with its job. An older worker, which does not know such keys, may have ended the job.
    local ttl_ms = job_id == ARGV[16] and redis.call('PTTL', KEYS[12]) or 0
    if ttl_ms > 0 and redis.call('PTTL', KEYS[11]) < 0 then
      redis.call('PEXPIRE', KEYS[11], ttl_ms)
    end
    return {'same', job_id}
  end
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  return {'duplicate', ''}
end

local size = #ARGV[2]
local max_job_bytes = math.min(positive(settings[3]) or tonumber(ARGV[8]), tonumber(ARGV[14]))
if size > max_job_bytes then
  return {'too_large', string.format('%d', max_job_bytes)}
end
-- Entries of ended jobs are deleted, so the streams hold only jobs that wait or run.
local max_jobs = positive(settings[2]) or tonumber(ARGV[7])
local num_jobs = length('ZCARD', KEYS[7])
  + length('XLEN', KEYS[4]) + length('XLEN', KEYS[5]) + length('XLEN', KEYS[6])
if num_jobs >= max_jobs then
  return {'full', string.format('%.17g', max_jobs)}
end
local max_bytes = positive(settings[4]) or tonumber(ARGV[9])
if read(KEYS[8]) + size > max_bytes then
  return {'full_bytes', string.format('%d', max_bytes)}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local per_s = positive(settings[5])
local apart = per_s and math.min(1000 / per_s, LONGEST_APART_MS)
if apart then
  -- GCRA: the key holds the time at which the tenant's next job is on time; it may be up to a second early. A time
  -- too far ahead for a submission to have written it is ignored.
  local on_time = read(KEYS[9])
  on_time = on_time <= now + apart + 1000 and math.max(now, on_time) or now
  local early = on_time - now - math.max(0, 1000 - apart)
  if early > 0 then
    return {'rate', string.format('%d', math.ceil(early))}
  end
  redis.call('SET', KEYS[9], string.format('%.17g', on_time + apart), 'PX', string.format('%d', 1000 + apart))
end

-- First the commands that may fail, since a key may hold another type: then the job was not accepted.
local entry
if tonumber(ARGV[13]) > 0 then
  redis.call('ZADD', KEYS[7], string.format('%d', now + ARGV[13]), ARGV[1])
else
  entry = redis.call('XADD', KEYS[3], '*', 'job', ARGV[2], unpack(fields))
end
redis.call('HSET', KEYS[1], 'attempt', 0, 'position', 0, 'deaths', 0, 'priority', ARGV[3],
  'submission', ARGV[4], 'reply_to', ARGV[5], 'submitted_at', now, 'bytes', size)
if tonumber(ARGV[15]) > 0 then
  local deadline_at = string.format('%d', now + ARGV[15])
  redis.call('HSET', KEYS[1], 'deadline_at', deadline_at)
  redis.pcall('ZADD', KEYS[10], deadline_at, ARGV[1])
end
if entry then
  redis.call('HSET', KEYS[1], 'status', 'queued', 'entry', entry)
else
  redis.call('HSET', KEYS[1], 'status', 'delayed', 'raw', ARGV[2], unpack(fields))
end
if type(redis.pcall('INCRBY', KEYS[8], size)) ~= 'number' then
  redis.call('SET', KEYS[8], size)
end
if ARGV[6] ~= '' then
  redis.call('HSET', KEYS[1], 'idempotency_key', ARGV[6])
  redis.call('SET', KEYS[11], ARGV[1])
end
return {'accepted', ARGV[1]}
