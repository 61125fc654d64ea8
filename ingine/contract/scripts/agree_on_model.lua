-- Say which model a queue's workers have, unless it is said already.
--
-- KEYS  1 queue settings
-- ARGV  1 fingerprint  2 that of workers which are gone, and which it replaces, or ''
-- returns the fingerprint that holds from now on

local holds = redis.call('HGET', KEYS[1], 'model')
if holds and holds ~= ARGV[2] then
  return holds
end
redis.call('HSET', KEYS[1], 'model', ARGV[1])
return ARGV[1]
