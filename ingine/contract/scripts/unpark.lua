-- Claim parked entries: those for our model, and those for models that no worker serves any more.
--
-- KEYS  1 jobs stream
-- ARGV  1 group  2 worker  3 free places  4 prefix of consumers of parked entries
--       5 time after which any worker may claim a parked entry, in ms  6 number of consumers whose entries are for us
--       7 most bytes of an entry  8.. names of those consumers, then of those whose entries are for other workers
-- returns {entries for us; entries that any worker may claim}: both as XRANGE does, and of an entry that has more
--          bytes, its id and number of bytes
--
-- Entries are claimed while a place is free, as in take.lua.

-- include: within.lua
-- include: count.lua
-- include: choices.lua

local first_of_others = 8 + ARGV[6]
local left = tonumber(ARGV[3])

-- Claim a consumer's oldest entries, if they have been idle for that long. A later call claims those behind them.
local function claim(consumer, min_idle)
  local claimed = {}
  for _, pending in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', left, consumer)) do
    if left <= 0 then
      break
    end
    for _, entry in ipairs(redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], min_idle, pending[1])) do
      claimed[#claimed + 1] = within(ARGV[7], entry)
      left = left - num_choices(claimed[#claimed])
    end
  end
  return claimed
end

local known, for_us, abandoned = {}, {}, {}
for i = 8, #ARGV do
  known[ARGV[i]] = true
  if i < first_of_others and left > 0 then
    for _, entry in ipairs(claim(ARGV[i], 0)) do
      for_us[#for_us + 1] = entry
    end
  end
end
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local name, num_pending = consumer[2], consumer[4]
  local is_parked = string.sub(name, 1, #ARGV[4]) == ARGV[4]
  if left > 0 and num_pending > 0 and is_parked and not known[name] then
    for _, entry in ipairs(claim(name, ARGV[5])) do
      abandoned[#abandoned + 1] = entry
    end
  end
end
return {for_us, abandoned}
