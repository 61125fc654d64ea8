-- Renew the leases of a worker's jobs: their entries' idle time starts again at 0.
--
-- KEYS  a pair a job: jobs stream, job hash
-- ARGV  1 group  2 worker  then two a job: entry, attempt
-- returns a number a job: 0 renewed, -1 stale (also: its record is none any more), -2 renewed, and somebody asked
--         to cancel it
--
-- XCLAIM with min-idle 0 would steal from the living, so ownership is decided by the attempt, never by
-- idleness. JUSTID leaves the delivery counter alone, and FORCE takes back an entry that is pending with nobody,
-- since somebody has acknowledged it or deleted our consumer.

local answers = {}
for i = 1, #KEYS / 2 do
  local entry, attempt = ARGV[1 + 2 * i], ARGV[2 + 2 * i]
  local record = redis.pcall('HMGET', KEYS[2 * i], 'status', 'attempt', 'cancel', 'worker')
  if not record.err and record[1] == 'running' and record[2] == attempt and record[4] == ARGV[2] then
    -- Where the stream is none any more, there is no lease to lose; the others keep theirs.
    redis.pcall('XCLAIM', KEYS[2 * i - 1], ARGV[1], ARGV[2], 0, entry, 'JUSTID', 'FORCE')
    answers[i] = record[3] == '1' and -2 or 0
  else
    answers[i] = -1
  end
end
return answers
