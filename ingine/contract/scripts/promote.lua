-- Move delayed jobs that are due to their jobs streams.
--
-- KEYS  1 delayed  2..4 jobs streams: high, normal, low  then the job hash of each candidate
-- ARGV  the candidates' job ids
-- returns how many were moved
--
-- The record keeps its time of submission, so the deadline does not change. A job stays delayed, and is tried again
-- later, if its stream's key holds another type or has no entry id left.

-- include: refusals.lua

local TRY_AGAIN_MS = 5000

local streams = {high = KEYS[2], normal = KEYS[3], low = KEYS[4]}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local num_promoted = 0
for i, id in ipairs(ARGV) do
  local due, job = redis.call('ZSCORE', KEYS[1], id), KEYS[4 + i]
  if due and tonumber(due) <= now then
    -- Any client may have written the record: a damaged one must not hold up the other jobs.
    local record = redis.pcall('HMGET', job, 'status', 'raw', 'priority', 'tenant', 'cost', 'choices')
    if record.err or record[1] ~= 'delayed' or not record[2] then
      redis.call('ZREM', KEYS[1], id)
    else
      local fields = {'job', record[2], 'tenant', record[4] or '', 'cost', record[5] or ''}
      if (record[6] or '') ~= '' then
        fields[7], fields[8] = 'choices', record[6]
      end
      local entry = redis.pcall('XADD', streams[record[3]] or streams.normal, '*', unpack(fields))
      if type(entry) == 'table' and entry.err then
        if not never_passes(entry) then
          return entry
        end
        redis.call('ZADD', KEYS[1], string.format('%d', now + TRY_AGAIN_MS), id)
      else
        redis.call('ZREM', KEYS[1], id)
        redis.call('HSET', job, 'status', 'queued', 'entry', entry)
        redis.call('HDEL', job, 'raw')
        num_promoted = num_promoted + 1
      end
    end
  end
end
return num_promoted
