-- Find entries that were delivered and are pending with no consumer, and waiting entries that have no place in the
-- fair order. Without this, no worker would ever read them.
--
-- KEYS  1 jobs stream  2 fair order
-- ARGV  1 group  2 entry to continue after, or '' to start  3 most entries to look at
--       4 consumer of waiting entries  5 consumer of released entries
-- returns {entry to continue after, or '' at the end; number of adopted entries}
--
-- Such entries are left when an operator deletes a consumer (XGROUP DELCONSUMER drops its pending entries), moves the
-- group forward (XGROUP SETID) or acknowledges entries by hand. Those in the fair order wait again. All others become
-- pending with `released`, and stay there for a lease: a worker that still runs one takes it back when it renews.

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
  -- If the group has read all entries, two comparisons of counts show that none is missing, without reading any.
  -- (XINFO's `lag` is the number of unread entries, but Redis 7.0 returns too much once an unread one was deleted.)
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
    -- It is older than the waiting entries, so it comes first. (If the order is empty, `take` rebuilds all of it.)
    redis.call('ZADD', KEYS[2], first[2], id)
    num_adopted = num_adopted + 1
  end
end
return {#entries == tonumber(ARGV[3]) and entries[#entries][1] or '', num_adopted}
