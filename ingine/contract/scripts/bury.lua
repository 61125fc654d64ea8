-- Move an entry that cannot run (its job id is unreadable or a duplicate, or its keys are unusable) to the dead letters.
--
-- KEYS  1 jobs stream  2 dead letters  3 job hash  4 token log  5 deadlines  6 bytes of the queue
--       7 replies stream  8 idempotency key
-- ARGV  1 group  2 worker  3 entry  4 raw job  5 code  6 reason  7 job id, or ''  8 result TTL in ms
--       9 terminal event  10 channel  11 1: send a reply to KEYS[7]  12 1: the job has the idempotency key of KEYS[8]
-- returns 1, or 0 where the entry is not ours any more

-- include: count.lua
-- include: end_job.lua
-- include: dead_letter.lua

-- End the job of this entry without a terminal event in its log, so that no client goes on waiting for it.
local function close_record()
  local keys = {job = KEYS[3], log = KEYS[4], deadlines = KEYS[5], bytes = KEYS[6], replies = KEYS[7], idempotency = KEYS[8]}
  local ending = {
    job_id = ARGV[7], status = 'failed', event = ARGV[9], channel = ARGV[10], ttl_ms = ARGV[8], has_reply = ARGV[11],
    has_key = ARGV[12],
  }
  local record = redis.pcall('HMGET', KEYS[3], 'status', 'entry')
  if record.err or not record[1] then
    tell(keys, ending) -- no script will send another event of this job
  elseif record[2] == ARGV[3] and (record[1] == 'queued' or record[1] == 'running') then
    close_job(keys, ending)
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
