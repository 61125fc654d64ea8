-- Record the model of a queue's workers, unless one is recorded.
--
-- KEYS  1 queue settings
-- ARGV  1 fingerprint  2 fingerprint to replace, of workers that are gone, or ''
-- returns the fingerprint that the queue has from now on

local recorded = redis.call('HGET', KEYS[1], 'model')
if recorded and recorded ~= ARGV[2] then
  return recorded
end
redis.call('HSET', KEYS[1], 'model', ARGV[1])
return ARGV[1]
