-- End a job: terminal event, record, reply, ack, delete and TTLs, all or nothing.
--
-- KEYS  1 jobs stream  2 job hash  3 token log  4 bytes of the queue  5 dead letters  6 deadlines
--       7 replies stream  8 idempotency key
-- ARGV  1 group  2 entry  3 attempt  4 position  5 status  6 event  7 channel  8 result TTL in ms
--       9 1: send a reply to KEYS[7]  10 worker  11 code and 12 reason of a copy for the dead letters, or ''
--       13 job id  14 1: the job has the idempotency key of KEYS[8]
-- returns a number, as append does: position: the job has ended; another n >= 0: the log ends at n; -1: stale

-- include: count.lua
-- include: end_job.lua
-- include: dead_letter.lua

local record = redis.call('HMGET', KEYS[2], 'status', 'attempt', 'position', 'worker')
if record[2] ~= ARGV[3] or record[4] ~= ARGV[10] then
  return -1
end
if record[1] ~= 'running' then
  -- It was ended by an earlier call whose reply was lost, or by another process.
  return record[1] == ARGV[5] and count(record[3]) or -1
end
if record[3] ~= ARGV[4] then
  return count(record[3]) or redis.error_reply('BADRECORD its position is not an integer')
end

-- After this the job has ended, and no command may fail any more, whatever the other keys hold.
local failed = end_job(
  {job = KEYS[2], log = KEYS[3], deadlines = KEYS[6], bytes = KEYS[4], replies = KEYS[7], idempotency = KEYS[8]},
  {
    job_id = ARGV[13], status = ARGV[5], position = ARGV[4], event = ARGV[6], channel = ARGV[7], ttl_ms = ARGV[8],
    has_reply = ARGV[9], has_key = ARGV[14],
  }
)
if failed then
  return failed
end
if ARGV[11] ~= '' then
  local why = {code = ARGV[11], reason = ARGV[12], deliveries = record[2], worker = ARGV[10]}
  copy_to_dead_letters(KEYS[5], KEYS[1], ARGV[2], why, '')
end
redis.pcall('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.pcall('XDEL', KEYS[1], ARGV[2])
return tonumber(ARGV[4])
