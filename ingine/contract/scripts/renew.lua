-- Renew the leases of a worker's jobs: the idle time of their entries restarts at 0.
--
-- KEYS  two for each job: jobs stream, job hash
-- ARGV  1 group  2 worker  then two for each job: entry, attempt
-- returns a number for each job: 0 renewed, -1 stale (also: its record's key holds another type), -2 renewed, and a
--         client has requested to cancel it
--
-- XCLAIM with min-idle 0 would take entries from live workers, so the attempt decides who owns one, never the idle
-- time. JUSTID does not count a delivery. FORCE takes back an entry that is pending with no consumer, since it was
-- acknowledged by hand or our consumer was deleted.

local answers = {}
for i = 1, #KEYS / 2 do
  local entry, attempt = ARGV[1 + 2 * i], ARGV[2 + 2 * i]
  local record = redis.pcall('HMGET', KEYS[2 * i], 'status', 'attempt', 'cancel', 'worker')
  if not record.err and record[1] == 'running' and record[2] == attempt and record[4] == ARGV[2] then
    -- If the stream's key holds another type, there is no lease to lose. The other jobs keep theirs.
    redis.pcall('XCLAIM', KEYS[2 * i - 1], ARGV[1], ARGV[2], 0, entry, 'JUSTID', 'FORCE')
    answers[i] = record[3] == '1' and -2 or 0
  else
    answers[i] = -1
  end
end
return answers
