-- Claim entries that are released, or whose holders were silent for a lease.
--
-- KEYS  1 jobs stream
-- ARGV  1 group  2 worker  3 lease in ms  4 free places  5 consumer of waiting entries, and 6 prefix of the consumers of
--       parked entries: the script claims none of these  7 most bytes of an entry
-- returns entries as XRANGE does; of one that has more bytes, its id and number of bytes
--
-- Entries are claimed while a place is free, as in take.lua.

-- include: within.lua
-- include: count.lua
-- include: choices.lua

local claimed, left = {}, tonumber(ARGV[4])
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local name, num_pending = consumer[2], consumer[4]
  if left > 0 and num_pending > 0 and name ~= ARGV[5] and string.sub(name, 1, #ARGV[6]) ~= ARGV[6] then
    local idle = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], '-', '+', left, name)
    for _, pending in ipairs(idle) do
      if left <= 0 then
        break
      end
      for _, entry in ipairs(redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], pending[1])) do
        claimed[#claimed + 1] = within(ARGV[7], entry)
        left = left - num_choices(claimed[#claimed])
      end
    end
  end
end
return claimed
