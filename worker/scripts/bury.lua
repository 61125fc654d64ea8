-- Move an entry that cannot be answered (no readable id, or a duplicate one) to the dead letters.
--
-- KEYS  1 jobs stream  2 dead letters
-- ARGV  1 group  2 worker  3 entry  4 raw job  5 code  6 reason
-- returns 1, or 0 where the entry is not ours any more

-- include: dead_letter.lua

local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if not pending[1] or pending[1][2] ~= ARGV[2] then
  return 0
end
local why = {code = ARGV[5], reason = ARGV[6], deliveries = pending[1][4], worker = ARGV[2]}
local failed = copy_to_dead_letters(KEYS[2], KEYS[1], ARGV[3], why, ARGV[4])
if failed then
  return failed
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
