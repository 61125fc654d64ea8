-- Give a jobs stream ids again, where somebody has used one of the last millisecond that there is: behind the last id
-- nobody could add a job any more. What has such an id is set aside, for put_back.lua.
--
-- KEYS  1 jobs stream  2 a key for its other entries meanwhile  3 entries that are set aside
-- ARGV  1 group  2 most entries to answer  3 most bytes of an entry
-- returns {1 if the stream was made anew, else 0; the first entries that are set aside, as XRANGE does, or their id
--          and number of bytes where these are more}
--
-- XSETID would not do: no server sets an id below an entry that is there, nor do all below one that was deleted. So
-- the stream is made anew, with the same entries, holders and idle times: they are moved away and back. Entries of the
-- last but one millisecond are set aside too: behind its last id the server goes on with the last one.

-- include: within.lua

local LAST_MS, FIRST_ASIDE = '18446744073709551615', '18446744073709551614-0'
local MAX_FIELDS = 1000 -- Lua passes on no more than some thousands. No job has more than three.

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

local function make_anew()
  local group
  for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    group = named(fields).name == ARGV[1] and named(fields) or group
  end
  set_aside()
  local pending, unread = {}, {}
  if group then
    pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '(' .. FIRST_ASIDE, group.pending + 1)
    -- An error: it has read the last id that there is.
    unread = redis.pcall('XRANGE', KEYS[1], '(' .. group['last-delivered-id'], '+', 'COUNT', 1)
  end
  redis.call('DEL', KEYS[2])
  move(KEYS[1], KEYS[2])
  move(KEYS[2], KEYS[1])
  if group then
    -- What it has read last may be gone, and new entries get lesser ids.
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
local stream, made_anew = redis.pcall('XINFO', 'STREAM', KEYS[1]), 0
if not stream.err and string.match(named(stream)['last-generated-id'], '^%d+') == LAST_MS then
  make_anew()
  made_anew = 1
end
local aside = redis.call('XRANGE', KEYS[3], '-', '+', 'COUNT', ARGV[2])
for i, entry in ipairs(aside) do
  aside[i] = within(ARGV[3], entry)
end
return {made_anew, aside}
