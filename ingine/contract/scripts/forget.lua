-- Delete consumers that are gone: idle for long, with nothing pending.
--
-- KEYS  jobs streams
-- ARGV  1 group  2 idle time in ms
-- returns how many were deleted
--
-- In one script, since XGROUP DELCONSUMER drops whatever has become pending in between.

local num_deleted = 0
for _, stream in ipairs(KEYS) do
  for _, consumer in ipairs(redis.pcall('XINFO', 'CONSUMERS', stream, ARGV[1])) do -- none of what is no stream
    local name, pending, idle = consumer[2], consumer[4], consumer[6]
    if pending == 0 and idle > tonumber(ARGV[2]) then
      redis.call('XGROUP', 'DELCONSUMER', stream, ARGV[1], name)
      num_deleted = num_deleted + 1
    end
  end
end
return num_deleted
