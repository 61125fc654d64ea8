-- Park an entry for workers of another model. It keeps its place in the stream, its record and its log.
--
-- KEYS  1 jobs stream  2 job hash
-- ARGV  1 group  2 worker  3 entry  4 consumer of entries that are parked for that model
-- returns 1, or 0 where the entry is not ours any more
--
-- Its idle time restarts at 0, and from then on is the time for which it has been parked.

-- include: count.lua

local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if not pending[1] or pending[1][2] ~= ARGV[2] then
  return 0
end
local record = redis.call('HMGET', KEYS[2], 'status', 'entry', 'worker', 'deaths')
if record[1] == 'running' and record[2] == ARGV[3] then
  -- Its worker died, which `begin` would have counted.
  local died = record[3] ~= ARGV[2] and 1 or 0
  redis.call('HSET', KEYS[2], 'status', 'queued', 'worker', '', 'deaths', (count(record[4]) or 0) + died)
end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0, ARGV[3], 'JUSTID')
return 1
