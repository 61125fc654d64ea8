-- Delay a job that we have begun: until its `not_before_ms`, or for a pause after a step that failed.
--
-- KEYS  1 jobs stream  2 job hash  3 delayed
-- ARGV  1 group  2 worker  3 entry  4 attempt  5 job id  6 pause in ms  7 1: count a death,
--       and double the pause with each death  8 longest pause in ms  9 consumer of released entries
-- returns 1, or 0 where the job is not ours any more
--
-- The job leaves its stream and is kept in its record until it is promoted; its log stays. If the key of the delayed
-- jobs holds another type, the job is released instead, without a pause.

-- include: count.lua
-- include: refusals.lua

local record = redis.call('HMGET', KEYS[2], 'status', 'attempt', 'worker', 'deaths', 'cancel')
local entry = redis.call('XRANGE', KEYS[1], ARGV[3], ARGV[3])[1]
if record[1] ~= 'running' or record[2] ~= ARGV[4] or record[3] ~= ARGV[2] or not entry then
  return 0
end
local pause, deaths = tonumber(ARGV[6]), count(record[4]) or 0
if ARGV[7] == '1' then
  deaths = deaths + 1
  redis.call('HSET', KEYS[2], 'deaths', deaths)
  -- A job that is to be cancelled need not wait: the next `begin` reports the request, and the job ends.
  pause = record[5] == '1' and 0 or math.min(pause * 2 ^ (deaths - 1), tonumber(ARGV[8]))
end
local time = redis.call('TIME')
local due = time[1] * 1000 + math.floor(time[2] / 1000) + pause
-- Add it before setting the status: a job with status `delayed` that is not in this set would be lost.
local added = redis.pcall('ZADD', KEYS[3], string.format('%d', due), ARGV[5])
if never_passes(added) then
  redis.call('HSET', KEYS[2], 'status', 'queued', 'worker', '')
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[9], 0, ARGV[3], 'IDLE', 1000000000, 'JUSTID')
  return 1
elseif type(added) == 'table' and added.err then
  return added
end
local fields = {}
for i = 1, #entry[2], 2 do
  fields[entry[2][i]] = entry[2][i + 1]
end
redis.call('HSET', KEYS[2], 'status', 'delayed', 'worker', '', 'raw', fields.job or '',
  'tenant', fields.tenant or '', 'cost', fields.cost or '', 'choices', fields.choices or '')
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
