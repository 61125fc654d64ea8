-- Find entries that were delivered and are pending with nobody, and entries that wait and have no place in the fair
-- order. Nobody would ever read either of them again.
--
-- KEYS  1 jobs stream  2 fair order
-- ARGV  1 group  2 entry to go on behind, or '' to begin  3 most entries to look at
--       4 consumer of what waits  5 consumer of what is released
-- returns {entry to go on behind, or '' at the end; how many were adopted}
--
-- That is what is left when an operator deletes a consumer (XGROUP DELCONSUMER drops what is pending with it), moves
-- the group forward (XGROUP SETID) or acknowledges by hand. What is in the fair order waits again. All else goes to
-- `released` for a lease: whoever still runs it takes it back with its next renewal.

local after = ARGV[2]
local group = {}
for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  if fields[2] == ARGV[1] then
    for i = 1, #fields, 2 do
      group[fields[i]] = fields[i + 1]
    end
  end
end
if not group.name then
  return {'', 0}
end

if after == '' then
  -- Where all has been read, two sums tell that nothing is missing, without a look at any entry. (XINFO's `lag` would
  -- say how much has not, but Redis 7.0 says too much once an entry was deleted that nobody had read.)
  local num_waiting = 0
  for _, consumer in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1])[4] or {}) do
    if consumer[1] == ARGV[4] then
      num_waiting = tonumber(consumer[2])
    end
  end
  if redis.call('XLEN', KEYS[1]) <= group.pending
    and num_waiting <= redis.call('ZCARD', KEYS[2]) then
    return {'', 0}
  end
end

local start = after == '' and '-' or '(' .. after
local entries = redis.call('XRANGE', KEYS[1], start, group['last-delivered-id'], 'COUNT', ARGV[3])
local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
local num_adopted = 0
for _, entry in ipairs(entries) do
  local id = entry[1]
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)[1]
  local place = redis.call('ZSCORE', KEYS[2], id)
  if not pending then
    redis.call('XCLAIM', KEYS[1], ARGV[1], place and ARGV[4] or ARGV[5], 0, id, 'JUSTID', 'FORCE')
    num_adopted = num_adopted + 1
  elseif pending[2] == ARGV[4] and not place and first[1] then
    -- It is older than what waits: next. (Where nothing has a place, `take` makes the whole order anew.)
    redis.call('ZADD', KEYS[2], first[2], id)
    num_adopted = num_adopted + 1
  end
end
return {#entries == tonumber(ARGV[3]) and entries[#entries][1] or '', num_adopted}
