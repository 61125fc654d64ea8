-- Begin a job: check that its entry is ours, take the next attempt number, and read how many tokens are committed.
--
-- KEYS  1 jobs stream  2 job hash  3 token log
-- ARGV  1 group  2 worker  3 entry  4 priority  5 reply_to or ''  6 number of deaths from which a job runs alone
--       7 number of deaths from which it does not run any more  8 1: the worker has no other job  9 lease in ms
--       10 fingerprint of the worker's model  11 1: no worker serves the job's model any more
--       12 model that the job names and that only other workers serve, or ''
--       13 version of the worker's grammar library
-- returns {'run', attempt, position, deaths, cancel, now_ms, submitted_at, first_token_at, idempotency key or '',
--          fingerprint of the model that made the committed tokens}
--       | {'other_model', name or fingerprint}  the job is for workers of that model: the one that made its committed
--                                               tokens, or, without any, the one that it names. Nothing was changed
--       | {'stale'}      the entry is not ours (any more)
--       | {'duplicate'}  another entry has this job id
--       | {'done'}       the job has ended before. This call has deleted the entry
--       | {'suspect'}    only a worker without other jobs may begin it. Only its lease was renewed
-- An error that begins with BADRECORD: the job can never run, since its record holds what no script writes.
--
-- A job that was added by a bare XADD has no record yet. It gets one here, with its entry's time as the time of
-- submission. Any client may choose that id, and once a clock was ahead ids continue from the future: a time that is
-- not in the past counts as now.

local FIRST_MS = 1577836800000 -- 2020: no job was submitted earlier

-- include: count.lua

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function past(text)
  local ms = tonumber(text)
  return ms and ms >= FIRST_MS and ms <= now and math.floor(ms)
end

-- For a field that is written back or becomes part of a key. Any client may have written it, at any length.
local function short(text)
  return text and #text <= 1024 and text or ''
end

local function weights(fingerprint)
  return string.match(fingerprint, '^[^:]*')
end

local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if not pending[1] or pending[1][2] ~= ARGV[2] then
  return {'stale'}
end

local record = redis.call('HMGET', KEYS[2],
  'status', 'entry', 'worker', 'position', 'cancel', 'submitted_at', 'first_token_at', 'deaths',
  'idempotency_key', 'model', 'attempt')
local status = record[1]
if status and record[2] ~= ARGV[3] then
  return {'duplicate'}
end
local made = count(record[4])
if status and not (made and count(record[11] or '0')) then
  return redis.error_reply('BADRECORD its position or attempt is not an integer')
end
if status and status ~= 'queued' and status ~= 'running' then
  -- Trust the status only if the log confirms it: otherwise a job that has not ended would vanish without a reply.
  local last = made .. '-1'
  if not redis.call('XRANGE', KEYS[3], last, last)[1] then
    return redis.error_reply('BADRECORD its status is not that of a job which waits, runs or has ended')
  end
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
  redis.call('XDEL', KEYS[1], ARGV[3])
  return {'done'}
end

-- Still `running` under another worker: that worker died. An attempt of our own whose reply was lost is no death.
local died = status == 'running' and record[3] ~= ARGV[2]
local deaths = (count(record[8]) or 0) + (died and 1 or 0)
local position = status and made or 0
local made_by = position > 0 and short(record[10]) or ''
local wanted = made_by ~= '' and made_by or ARGV[12]
-- A job that will end without running needs no model.
local ends = record[5] == '1' or deaths >= tonumber(ARGV[7])
if wanted ~= '' and wanted ~= ARGV[10] and ARGV[11] ~= '1' and not ends then
  return {'other_model', wanted}
end
-- Restart its lease: the entry may have waited in this worker, behind jobs whose long prompts it read first.
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
if deaths >= tonumber(ARGV[6]) and deaths < tonumber(ARGV[7]) and ARGV[8] ~= '1' then
  return {'suspect'}
end

if not status then
  record[6] = string.format('%d', past(string.match(ARGV[3], '^%d+')) or now)
  redis.call('HSET', KEYS[2], 'position', 0, 'entry', ARGV[3], 'priority', ARGV[4], 'reply_to', ARGV[5],
    'submitted_at', record[6])
end
local attempt = redis.call('HINCRBY', KEYS[2], 'attempt', 1)
redis.call('HSET', KEYS[2], 'status', 'running', 'worker', ARGV[2], 'began_at', now, 'deaths', deaths,
  'lease_ms', ARGV[9], 'llguidance', ARGV[13])
-- Committed tokens keep the fingerprint of the model that made them, until a worker with the same weights continues.
if weights(made_by) == weights(ARGV[10]) or made_by == '' then
  redis.call('HSET', KEYS[2], 'model', ARGV[10])
end
return {'run', attempt, position, deaths, record[5] == '1' and 1 or 0, now, past(record[6]) or now,
  past(record[7]) or 0, short(record[9]), made_by}
