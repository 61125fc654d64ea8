-- Add an entry that renumber.lua has set aside to its jobs stream again, under a new id. It waits again.
--
-- KEYS  1 entries that are set aside  2 jobs stream  3 hash of its job, if the job has an id
-- ARGV  1 id of the entry in KEYS[1]
-- returns 1, or 0 where it was put back before
--
-- A running job is released: its holder's attempt is stale from then on, and no death is counted. A job that has ended
-- since needs no entry.

local aside = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not aside then
  return 0
end
local was = aside[2][2]
local record = redis.pcall('HMGET', KEYS[3], 'status', 'entry')
local is_ours = not record.err and record[2] == was
if not is_ours or record[1] == 'queued' or record[1] == 'running' then
  local id = redis.call('XADD', KEYS[2], '*', unpack(aside[2], 3))
  if is_ours then
    redis.call('HSET', KEYS[3], 'entry', id)
  end
  if is_ours and record[1] == 'running' then
    redis.call('HSET', KEYS[3], 'status', 'queued', 'worker', '')
  end
end
redis.call('XDEL', KEYS[1], ARGV[1])
if redis.call('XLEN', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[1])
end
return 1
