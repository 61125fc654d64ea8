-- Put a dead letter back into the jobs stream that it came from, unless it could not run there.
--
-- KEYS  1 dead letters  2 jobs stream  3 job hash (only where the job's id can be read)
-- ARGV  1 dead letter's entry
-- returns {'requeued', entry id} | {'missing', ''} | {'known', status} | {'no_job', ''}
--
-- A dead letter whose job id has a record stays: a worker would bury the entry again, as a duplicate.

local letter = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not letter then
  return {'missing', ''}
end
local fields = {}
for i = 1, #letter[2], 2 do
  fields[letter[2][i]] = letter[2][i + 1]
end
local status = KEYS[3] and redis.call('HGET', KEYS[3], 'status')
if status then
  return {'known', status}
end
if not fields.job then
  return {'no_job', ''}
end
local entry = {'XADD', KEYS[2], '*', 'job', fields.job}
for _, name in ipairs({'tenant', 'cost', 'choices'}) do
  if fields[name] then
    entry[#entry + 1] = name
    entry[#entry + 1] = fields[name]
  end
end
local id = redis.call(unpack(entry))
redis.call('XDEL', KEYS[1], ARGV[1])
return {'requeued', id}
