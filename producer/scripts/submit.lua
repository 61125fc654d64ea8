-- Accept one job, or say why not: limits, idempotency, duplicate id, XADD and the job's record, all or nothing.
--
-- KEYS  1 job hash  2 queue settings  3 the jobs stream of this priority  4..6 all three jobs streams
--       7 idempotency key (only where ARGV[6] > 0)
-- ARGV  1 job id  2 msgpack job  3 priority  4 submission (a nonce)  5 reply_to or ''
--       6 idempotency TTL in ms, 0: no idempotency key  7 default max_jobs  8 default max_job_bytes
-- returns {'accepted', entry id} | {'same', job id}       same: this idempotency key submitted that job before
--       | {'duplicate', ''} | {'full', max_jobs} | {'too_large', max_job_bytes}
--
-- A client library may send a script twice when the reply to the first is lost. The nonce makes the second
-- one harmless: it finds its own submission and gets the same answer.

local known = redis.call('HMGET', KEYS[1], 'submission', 'entry')
if known[1] == ARGV[4] then
  return {'accepted', known[2]}
end

if tonumber(ARGV[6]) > 0 then
  local job_id = redis.call('GET', KEYS[7])
  if job_id then
    return {'same', job_id}
  end
end

if redis.call('EXISTS', KEYS[1]) == 1 then
  return {'duplicate', ''}
end

local limits = redis.call('HMGET', KEYS[2], 'max_jobs', 'max_job_bytes')
local max_jobs = tonumber(limits[1] or ARGV[7])
local max_job_bytes = tonumber(limits[2] or ARGV[8])
if #ARGV[2] > max_job_bytes then
  return {'too_large', tostring(max_job_bytes)}
end
-- Finished entries are deleted, so the streams hold just what waits or runs.
local num_jobs = redis.call('XLEN', KEYS[4]) + redis.call('XLEN', KEYS[5]) + redis.call('XLEN', KEYS[6])
if num_jobs >= max_jobs then
  return {'full', tostring(max_jobs)}
end

local entry = redis.call('XADD', KEYS[3], '*', 'job', ARGV[2])
local now = redis.call('TIME')
redis.call('HSET', KEYS[1],
  'status', 'queued', 'attempt', 0, 'position', 0, 'deaths', 0,
  'entry', entry, 'priority', ARGV[3], 'submission', ARGV[4], 'reply_to', ARGV[5],
  'submitted_at', now[1] * 1000 + math.floor(now[2] / 1000))
if tonumber(ARGV[6]) > 0 then
  redis.call('SET', KEYS[7], ARGV[1], 'PX', ARGV[6])
end
return {'accepted', entry}
