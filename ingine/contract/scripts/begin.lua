-- Take a job: check that its entry is ours, take the next attempt number, learn what is committed.
--
-- KEYS  1 jobs stream  2 job hash  3 token log
-- ARGV  1 group  2 worker  3 entry  4 priority  5 reply_to or ''  6 deaths from which a job runs alone
--       7 deaths from which it runs no more  8 1: the worker has no other job  9 lease in ms
--       10 fingerprint of the worker's model  11 1: nobody serves the job's model any more
--       12 model that the job names and that only others serve, or ''
-- returns {'run', attempt, position, deaths, cancel, now_ms, submitted_at, first_token_at, idempotency key or '',
--          fingerprint of the model that has made what is committed}
--       | {'other_model', name or fingerprint}  for workers of that model, which decides by what is committed and
--                                               else by the name; nothing was done
--       | {'stale'}      the entry is not ours (any more)
--       | {'duplicate'}  another entry has this job id
--       | {'done'}       the job has ended before; the entry is gone now
--       | {'suspect'}    to be begun by a worker without other jobs; nothing was done, but its lease is renewed
-- An error that begins with BADRECORD: nothing can come of this entry, since its record says what no script writes.
--
-- A bare XADD has no record yet: it is made here, with the entry's own time as the time of submission. That is
-- only as good as the id, which anybody may choose, and which goes on from the future once a clock was ahead: what
-- is no time of the past counts as now.

local FIRST_MS = 1577836800000 -- 2020: nothing was submitted before

-- include: count.lua

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function past(text)
  local ms = tonumber(text)
  return ms and ms >= FIRST_MS and ms <= now and math.floor(ms)
end

-- Of what is written back, or becomes part of a key: anybody may have made it long.
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
  -- The log tells whether that is so: else a job that has not ended would go without a word.
  local last = made .. '-1'
  if not redis.call('XRANGE', KEYS[3], last, last)[1] then
    return redis.error_reply('BADRECORD its status is not that of a job which waits, runs or has ended')
  end
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
  redis.call('XDEL', KEYS[1], ARGV[3])
  return {'done'}
end

-- Still `running` under another worker: that one died without a word. Our own half-begun attempt, whose
-- reply was lost, is no death.
local died = status == 'running' and record[3] ~= ARGV[2]
local deaths = (count(record[8]) or 0) + (died and 1 or 0)
local position = status and made or 0
local made_by = position > 0 and short(record[10]) or ''
local wanted = made_by ~= '' and made_by or ARGV[12]
-- A job that is to end, and not to run, needs no model.
local ends = record[5] == '1' or deaths >= tonumber(ARGV[7])
if wanted ~= '' and wanted ~= ARGV[10] and ARGV[11] ~= '1' and not ends then
  return {'other_model', wanted}
end
-- Its lease starts again: the entry may have waited here, behind others whose prompts take long to read.
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
  'lease_ms', ARGV[9])
-- What is committed stays another model's until a worker of the same weights goes on with it.
if weights(made_by) == weights(ARGV[10]) or made_by == '' then
  redis.call('HSET', KEYS[2], 'model', ARGV[10])
end
return {'run', attempt, position, deaths, record[5] == '1' and 1 or 0, now, past(record[6]) or now,
  past(record[7]) or 0, short(record[9]), made_by}
