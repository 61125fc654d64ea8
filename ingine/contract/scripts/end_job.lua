-- End a job: with `end_job`, or with `close_job` where its log cannot be written. The caller has checked that the job
-- may end, and removes its entry itself.
--
-- Needs count.lua.
--
-- keys    job, log, deadlines, bytes, replies, idempotency
-- ending  job_id, status, position, event, channel, ttl_ms, has_reply ('1': the event goes to the replies stream),
--         has_key ('1': the job was submitted with that idempotency key)
-- returns nil, or the server's error for the log: then nothing was changed
--
-- Once the log is written no command may fail: a key of another type must not leave a job half ended.

-- Delete replies that have expired. A reply is kept as long as the result of its own job, which a field says: the time
-- in its id stays in the future once a clock was ahead.
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
    -- A reply without the field was written by hand, or by an older version.
    local written_at = math.min(tonumber(string.match(oldest[1], '^%d+')), now)
    local expires_at = count(fields.expires_at) or written_at + ttl_ms
    -- None of our replies expires later than the stream (but for rounding). One that claims to would keep all others
    -- behind it from being deleted.
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
  -- Replies of other jobs are in the stream too: never shorten its time to live.
  local longest_ms = math.max(redis.call('PTTL', replies), ttl_ms)
  local reply = redis.pcall('XADD', replies, '*', 'event', event, 'expires_at', string.format('%d', now + ttl_ms))
  if type(reply) ~= 'table' then
    redis.call('PEXPIRE', replies, longest_ms)
    drop_old_replies(replies, now, longest_ms)
  end
end

-- Send the event to the replies stream and the channel. Uses no key of the job itself.
local function tell(keys, ending)
  if ending.has_reply == '1' then
    send_reply(keys.replies, ending.event, tonumber(ending.ttl_ms))
  end
  redis.call('SPUBLISH', ending.channel, ending.event)
end

-- Do everything but write the terminal event to the log.
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
