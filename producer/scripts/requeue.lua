-- Put a dead letter back into the jobs stream that it came from, unless it could not run there.
--
-- KEYS  1 dead letters  2 jobs stream  3 job hash (only where the job's id can be read)
-- ARGV  1 dead letter's entry
-- returns {'requeued', entry id} | {'missing', ''} | {'known', status}
--
-- A job id that has a record is taken: the worker would bury the entry again as a duplicate.

local letter = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not letter then
  return {'missing', ''}
end
if KEYS[3] then
  local status = redis.call('HGET', KEYS[3], 'status')
  if status then
    return {'known', status}
  end
end

local fields = letter[2]
local job
for i = 1, #fields, 2 do
  if fields[i] == 'job' then
    job = fields[i + 1]
  end
end
local entry = redis.call('XADD', KEYS[2], '*', 'job', job)
redis.call('XDEL', KEYS[1], ARGV[1])
return {'requeued', entry}
