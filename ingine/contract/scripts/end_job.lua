-- What every end of a job does: `end_job`, or `close_job` where its log cannot be written. The caller has checked that
-- the job may end; it removes the job's entry itself.
--
-- Needs count.lua.
--
-- keys    job, log, deadlines, bytes, replies, idempotency
-- ending  job_id, status, position, event, channel, ttl_ms, has_reply ('1': the event goes to the replies stream),
--         has_key ('1': the job was submitted with that idempotency key)
-- returns nil, or the error that the log answered: then nothing was done
--
-- Behind the log nothing may fail: a foreign key that somebody has put there must not leave a job half ended.

-- A reply stays for as long as its own job's result. What says so is a field and not the entry's id, which is in
-- the future for ever once a clock was ahead.
local function drop_old_replies(replies, now, ttl_ms)
  for _ = 1, 100 do
    local oldest = redis.call('XRANGE', replies, '-', '+', 'COUNT', 1)[1]
    if not oldest then
      return
    end
    local fields = {}
    for i = 1, #oldest[2], 2 do
      fields[oldest[2][i]] = oldest[2][i + 1]
    end
    -- Without the field: written by hand, or by a version that had none.
    local written_at = math.min(tonumber(string.match(oldest[1], '^%d+')), now)
    local expires_at = count(fields.expires_at) or written_at + ttl_ms
    -- No reply of ours outlives the whole stream (but for the rounding of clocks): such a one would hide all others.
    if expires_at > now and expires_at <= now + ttl_ms + 1000 then
      return
    end
    redis.call('XDEL', replies, oldest[1])
  end
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function send_reply(replies, event, ttl_ms)
  local now = now_ms()
  -- Others' replies lie there too: its time to live never gets shorter.
  local longest_ms = math.max(redis.call('PTTL', replies), ttl_ms)
  local reply = redis.pcall('XADD', replies, '*', 'event', event, 'expires_at', string.format('%d', now + ttl_ms))
  if type(reply) ~= 'table' then
    redis.call('PEXPIRE', replies, longest_ms)
    drop_old_replies(replies, now, longest_ms)
  end
end

-- Needs no key of the job itself.
local function tell(keys, ending)
  if ending.has_reply == '1' then
    send_reply(keys.replies, ending.event, tonumber(ending.ttl_ms))
  end
  redis.call('SPUBLISH', ending.channel, ending.event)
end

-- All but the terminal event in the log.
local function close_job(keys, ending)
  redis.call('HSET', keys.job, 'status', ending.status, 'finished_at', now_ms())
  redis.call('HDEL', keys.job, 'raw')
  redis.call('PEXPIRE', keys.job, ending.ttl_ms)
  redis.call('PEXPIRE', keys.log, ending.ttl_ms)
  redis.pcall('ZREM', keys.deadlines, ending.job_id)
  if ending.has_key == '1' then
    redis.call('PEXPIRE', keys.idempotency, ending.ttl_ms)
  end
  local num_bytes = count(redis.call('HGET', keys.job, 'bytes') or nil)
  local bytes_left = num_bytes and redis.pcall('DECRBY', keys.bytes, num_bytes)
  if type(bytes_left) == 'number' and bytes_left <= 0 then
    redis.call('DEL', keys.bytes)
  end
  tell(keys, ending)
end

local function end_job(keys, ending)
  local logged = redis.pcall('XADD', keys.log, ending.position .. '-1', 'event', ending.event)
  if type(logged) == 'table' and logged.err then
    return logged
  end
  close_job(keys, ending)
end
