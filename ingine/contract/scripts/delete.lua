-- Delete the record and the log of a job that has ended, before its result's TTL.
--
-- KEYS  1 job hash  2 token log
-- ARGV  none
-- returns 'deleted' | 'unknown' | the status of a job that has not ended, which stays as it is
--
-- Called again, it returns 'unknown'. It uses PEXPIRE, which a producer may do, and not DEL.

local status = redis.call('HGET', KEYS[1], 'status')
if not status then
  return 'unknown'
end
if status == 'queued' or status == 'running' or status == 'delayed' then
  return status
end
redis.call('PEXPIRE', KEYS[1], 0)
redis.call('PEXPIRE', KEYS[2], 0)
return 'deleted'
