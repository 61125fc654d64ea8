-- Move an entry that cannot be answered (no readable id, a duplicate one, or unusable keys) to the dead letters.
--
-- KEYS  1 jobs stream  2 dead letters  3 job hash  4 token log  5 deadlines  6 bytes of the queue
-- ARGV  1 group  2 worker  3 entry  4 raw job  5 code  6 reason  7 job id, or ''  8 result TTL in ms
-- returns 1, or 0 where the entry is not ours any more

-- include: count.lua
-- include: dead_letter.lua

-- A job of this entry ends in its record alone, without a terminal event: nobody shall wait for it any more.
local function close_record()
  local record = redis.pcall('HMGET', KEYS[3], 'status', 'entry', 'bytes')
  if record.err or record[2] ~= ARGV[3] or (record[1] ~= 'queued' and record[1] ~= 'running') then
    return
  end
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[3], 'status', 'failed', 'finished_at', time[1] * 1000 + math.floor(time[2] / 1000))
  redis.call('HDEL', KEYS[3], 'raw')
  redis.call('PEXPIRE', KEYS[3], ARGV[8])
  redis.call('PEXPIRE', KEYS[4], ARGV[8])
  redis.pcall('ZREM', KEYS[5], ARGV[7])
  local num_bytes = count(record[3])
  local bytes_left = num_bytes and redis.pcall('DECRBY', KEYS[6], num_bytes)
  if type(bytes_left) == 'number' and bytes_left <= 0 then
    redis.call('DEL', KEYS[6])
  end
end

local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if not pending[1] or pending[1][2] ~= ARGV[2] then
  return 0
end
local why = {code = ARGV[5], reason = ARGV[6], deliveries = pending[1][4], worker = ARGV[2]}
local failed = copy_to_dead_letters(KEYS[2], KEYS[1], ARGV[3], why, ARGV[4])
if failed then
  return failed
end
if ARGV[7] ~= '' then
  close_record()
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
