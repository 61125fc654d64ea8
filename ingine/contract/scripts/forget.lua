-- Delete the consumers of workers that are gone: idle for long, with nothing pending.
--
-- KEYS  jobs streams
-- ARGV  1 group  2 idle time in ms
-- returns how many were deleted
--
-- This is one script because XGROUP DELCONSUMER drops all entries that are pending with the consumer.

local num_deleted = 0
for _, stream in ipairs(KEYS) do
  -- For a key of another type this is an error, in which ipairs finds no consumer.
  for _, consumer in ipairs(redis.pcall('XINFO', 'CONSUMERS', stream, ARGV[1])) do
    local name, pending, idle = consumer[2], consumer[4], consumer[6]
    if pending == 0 and idle > tonumber(ARGV[2]) then
      redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], name)
      num_deleted = num_deleted + 1
    end
  end
end
return num_deleted
