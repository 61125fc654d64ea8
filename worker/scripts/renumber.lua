-- Give a jobs stream ids again, where somebody has used an id of the last millisecond that there is: with its last one
-- nobody could add a job any more, and until then each new job gets an id that cannot stay.
--
-- KEYS  1 jobs stream  2 a key for its entries meanwhile  3 dead letters  then the job hash of each entry of ARGV
-- ARGV  1 group  2 worker  3 1: only look  then the entries of that millisecond whose jobs have an id
-- returns how many entries went to the dead letters, or -1 where there are ids left: nothing was done. 0: only looked
--
-- XSETID would not do: no server sets an id below an entry that is there, nor do all below one that was deleted. So
-- the stream is made anew, with the same entries, holders and idle times: they are moved away and back. What was added
-- in the last millisecond that there is cannot keep its id: it is added anew if it waits. What of it runs ends as it
-- would, and a copy goes to the dead letters; so does what came after the caller's look, or has no job id.

-- include: dead_letter.lua

local LAST_MS = '18446744073709551615'
local MAX_FIELDS = 1000 -- Lua passes on no more than some thousands. No job has more than three.

local function named(list)
  local fields = {}
  for i = 1, #list, 2 do
    fields[list[i]] = list[i + 1]
  end
  return fields
end

local stream = redis.pcall('XINFO', 'STREAM', KEYS[1])
if stream.err or string.match(named(stream)['last-generated-id'], '^%d+') ~= LAST_MS then
  return -1
end
if ARGV[3] == '1' then
  return 0
end
local group
for _, fields in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  group = named(fields).name == ARGV[1] and named(fields) or group
end
local pending = group and redis.call('XPENDING', KEYS[1], ARGV[1], '-', '(' .. LAST_MS .. '-0', group.pending + 1) or {}

local job_of = {}
for i = 4, #ARGV do
  job_of[ARGV[i]] = KEYS[i]
end

-- Not what runs or has ended under this entry. Of another entry's record the worker tells that this is a duplicate.
local function waits(id)
  local record = job_of[id] and redis.pcall('HMGET', job_of[id], 'status', 'entry')
  return record and not record.err and (record[2] ~= id or record[1] == 'queued')
end

local last, waiting, num_buried = redis.call('XRANGE', KEYS[1], LAST_MS .. '-0', '+'), {}, 0
local why = {code = 'bad_record', reason = 'behind its id no other is possible', deliveries = 0, worker = ARGV[2]}
for _, entry in ipairs(last) do
  if waits(entry[1]) then
    waiting[#waiting + 1] = entry
  else
    local failed = copy_to_dead_letters(KEYS[3], KEYS[1], entry[1], why, '')
    if failed then
      return failed
    end
    num_buried = num_buried + 1
  end
end

local function fields_of(entry)
  return unpack(entry[2], 1, math.min(#entry[2], MAX_FIELDS))
end

local function move(from, to)
  local after, entries = '-'
  repeat
    entries = redis.call('XRANGE', from, after, '(' .. LAST_MS .. '-0', 'COUNT', 100)
    for _, entry in ipairs(entries) do
      redis.call('XADD', to, entry[1], fields_of(entry))
      after = '(' .. entry[1]
    end
  until #entries == 0
  redis.call('DEL', from)
end

redis.call('DEL', KEYS[2])
move(KEYS[1], KEYS[2])
move(KEYS[2], KEYS[1])
if group then
  local delivered = group['last-delivered-id']
  local is_last = string.sub(delivered, 1, #LAST_MS + 1) == LAST_MS .. '-'
  redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], is_last and '$' or delivered, 'MKSTREAM')
  for _, each in ipairs(pending) do
    redis.call('XCLAIM', KEYS[1], ARGV[1], each[2], 0, each[1], 'IDLE', each[3], 'RETRYCOUNT', each[4], 'FORCE', 'JUSTID')
  end
end
for _, entry in ipairs(waiting) do
  local id, job = redis.call('XADD', KEYS[1], '*', fields_of(entry)), job_of[entry[1]]
  if redis.call('HGET', job, 'entry') == entry[1] then
    redis.call('HSET', job, 'entry', id)
  end
end
return num_buried
