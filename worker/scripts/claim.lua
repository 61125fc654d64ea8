-- Claim entries whose holders were silent for a lease, or have released or parked them.
--
-- KEYS  1 jobs stream
-- ARGV  1 group  2 worker  3 lease in ms  4 count  5 consumer of what waits: never claimed from
--       6 prefix of the consumers of parked entries  7 after how long anybody may claim a parked entry, in ms
--       8 number of the following consumers whose parked entries are for us  9.. their names
--       then the names of those whose parked entries are for other workers that live: not claimed from
-- returns {entries, as XRANGE does; abandoned ones, which were parked for workers that are gone}

local for_us, for_others = {}, {}
for i = 9, #ARGV do
  local parked = i - 8 <= tonumber(ARGV[8]) and for_us or for_others
  parked[ARGV[i]] = true
end

-- How long a consumer's entries have to be idle, nil if they are not to be claimed; true if they are abandoned.
local function claimable(consumer)
  if consumer == ARGV[5] or for_others[consumer] then
    return nil
  elseif for_us[consumer] then
    return 0
  elseif string.sub(consumer, 1, #ARGV[6]) == ARGV[6] then
    return ARGV[7], true
  end
  return ARGV[3]
end

local claimed, abandoned = {}, {}
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local name, num_pending, room = consumer[2], consumer[4], ARGV[4] - #claimed - #abandoned
  local min_idle, is_abandoned = claimable(name)
  if room <= 0 then
    break
  end
  if num_pending > 0 and min_idle then
    local entries = is_abandoned and abandoned or claimed
    local idle = redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', min_idle, '-', '+', room, name)
    for _, pending in ipairs(idle) do
      for _, entry in ipairs(redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], min_idle, pending[1])) do
        entries[#entries + 1] = entry
      end
    end
  end
end
return {claimed, abandoned}
