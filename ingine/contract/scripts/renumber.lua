-- Rebuild a jobs stream whose ids are used up: a client has added an entry with an id of the last possible
-- millisecond, and after the last id no job could be added. Entries with such ids are set aside, for put_back.lua.
--
-- KEYS  1 jobs stream  2 a temporary key for its other entries  3 entries that are set aside
-- ARGV  1 group  2 most entries to return  3 most bytes of an entry
-- returns {1 if the stream was rebuilt, else 0; the first entries that are set aside, as XRANGE does; of one that has
--          more bytes, its id and number of bytes}
--
-- XSETID is not enough: no server accepts an id below that of an existing entry, and some accept none below that of a
-- deleted one. So the stream is rebuilt with the same entries, holders and idle times: they are moved away and back.
-- Entries of the last but one millisecond are set aside too: after its last id the server continues in the last one.

-- include: within.lua

local LAST_MS, FIRST_ASIDE = '18446744073709551615', '18446744073709551614-0'
local MAX_FIELDS = 1000 -- Lua cannot unpack more than some thousands. No job has more than four fields.

local function named(list)
  local fields = {}
  for i = 1, #list, 2 do
    fields[list[i]] = list[i + 1]
  end
  return fields
end

local function fields_of(entry)
  return unpack(entry[2], 1, math.min(#entry[2], MAX_FIELDS))
end

local function set_aside()
  local entries
  repeat
    entries = redis.call('XRANGE', KEYS[1], FIRST_ASIDE, '+', 'COUNT', 100)
    for _, entry in ipairs(entries) do
      redis.call('XADD', KEYS[3], '*', 'entry', entry[1], fields_of(entry))
      redis.call('XDEL', KEYS[1], entry[1])
    end
  until #entries == 0
end

local function move(from, to)
  local after, entries = '-'
  repeat
    entries = redis.call('XRANGE', from, after, '+', 'COUNT', 100)
    for _, entry in ipairs(entries) do
      redis.call('XADD', to, entry[1], fields_of(entry))
      after = '(' .. entry[1]
    end
  until #entries == 0
  redis.call('DEL', from)
end

local function rebuild()
  local group
  for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    group = named(fields).name == ARGV[1] and named(fields) or group
  end
  set_aside()
  local pending, unread = {}, {}
  if group then
    pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '(' .. FIRST_ASIDE, group.pending + 1)
    -- Returns an error, and no entry, if the group has read the last possible id.
    unread = redis.pcall('XRANGE', KEYS[1], '(' .. group['last-delivered-id'], '+', 'COUNT', 1)
  end
  redis.call('DEL', KEYS[2])
  move(KEYS[1], KEYS[2])
  move(KEYS[2], KEYS[1])
  if group then
    -- If the group has read all, start it at the end: the entry that it read last may be gone, and new ids are lower.
    local delivered = unread[1] and group['last-delivered-id'] or '$'
    redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], delivered, 'MKSTREAM')
    for _, each in ipairs(pending) do
      redis.call('XCLAIM', KEYS[1], ARGV[1], each[2], 0, each[1], 'IDLE', each[3], 'RETRYCOUNT', each[4], 'FORCE', 'JUSTID')
    end
  end
end

if type(redis.pcall('XLEN', KEYS[3])) ~= 'number' then
  redis.call('DEL', KEYS[3])
end
local stream, rebuilt = redis.pcall('XINFO', 'STREAM', KEYS[1]), 0
if not stream.err and string.match(named(stream)['last-generated-id'], '^%d+') == LAST_MS then
  rebuild()
  rebuilt = 1
end
local aside = redis.call('XRANGE', KEYS[3], '-', '+', 'COUNT', ARGV[2])
for i, entry in ipairs(aside) do
  aside[i] = within(ARGV[3], entry)
end
return {rebuilt, aside}
