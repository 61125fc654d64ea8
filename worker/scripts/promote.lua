-- Put delayed jobs whose time has come into their jobs streams.
--
-- KEYS  1 delayed  2..4 jobs streams: high, normal, low  then the job hash of each candidate
-- ARGV  the candidates' job ids
-- returns how many were promoted
--
-- The record keeps its time of submission, so the deadline stays where it was.

local streams = {high = KEYS[2], normal = KEYS[3], low = KEYS[4]}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local num_promoted = 0
for i, id in ipairs(ARGV) do
  local due, job = redis.call('ZSCORE', KEYS[1], id), KEYS[4 + i]
  if due and tonumber(due) <= now then
    redis.call('ZREM', KEYS[1], id)
    -- Anybody may have written there: a record that is none must not hold up the others.
    local record = redis.pcall('HMGET', job, 'status', 'raw', 'priority', 'tenant', 'cost')
    if not record.err and record[1] == 'delayed' and record[2] then
      local entry = redis.call('XADD', streams[record[3]] or streams.normal, '*',
        'job', record[2], 'tenant', record[4] or '', 'cost', record[5] or '')
      redis.call('HSET', job, 'status', 'queued', 'entry', entry)
      redis.call('HDEL', job, 'raw')
      num_promoted = num_promoted + 1
    end
  end
end
return num_promoted
