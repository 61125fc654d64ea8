-- Announce a new number of partitions to producers, if this partition is empty. Or only check that it is.
--
-- KEYS  1 queue settings  2..4 all three jobs streams  5 delayed  6 dead letters
-- ARGV  1 the number (absent: only check)
-- returns '' | what the partition holds

for i = 2, 4 do
  local num_jobs = redis.call('XLEN', KEYS[i])
  if num_jobs > 0 then
    return num_jobs .. ' jobs in ' .. KEYS[i]
  end
end
local num_delayed = redis.call('ZCARD', KEYS[5])
if num_delayed > 0 then
  return num_delayed .. ' delayed jobs'
end
local num_letters = redis.call('XLEN', KEYS[6])
if num_letters > 0 then
  return num_letters .. ' dead letters'
end
if ARGV[1] then
  redis.call('HSET', KEYS[1], 'partitions', ARGV[1])
end
return ''
