-- Commit the new tokens of one step, for each running job of a queue.
--
-- KEYS  two for each job: job hash, token log
-- ARGV  1 worker  then five for each job: attempt, start (tokens committed before), position (tokens committed
--       after), event, channel or ''
-- returns a number for each job:
--   n >= 0  number of committed tokens. Equal to `position`: they were written (by this call, or by an earlier one
--           whose reply was lost). Any other number: the log ends there, send the tokens from n on.
--   -1      stale: the attempt is not ours any more. The script compares the worker too, since a server that lost its
--           last second may issue an attempt number twice
--   -2      cancelled: nothing was written, finish the job
--   -3      broken: its keys hold values of another type, or its position is no number. It can never be written

-- A temporary error (no memory, no disk) fails the whole call, which is made again. Any other concerns one job only.

-- include: count.lua
-- include: refusals.lua

local answers = {}
local now
for i = 1, #KEYS / 2 do
  local job, log = KEYS[2 * i - 1], KEYS[2 * i]
  local attempt, start, position, event, channel = unpack(ARGV, 5 * i - 3, 5 * i + 1)
  local record = redis.pcall('HMGET', job, 'status', 'attempt', 'position', 'cancel', 'worker')
  if record.err then
    if not never_passes(record) then
      return record
    end
    answers[i] = -3
  elseif record[1] ~= 'running' or record[2] ~= attempt or record[5] ~= ARGV[1] then
    answers[i] = -1
  elseif record[3] ~= start then
    answers[i] = count(record[3]) or -3
  elseif record[4] == '1' then
    answers[i] = -2
  else
    local entry = redis.pcall('XADD', log, position .. '-0', 'event', event)
    if never_passes(entry) then
      answers[i] = -3
    elseif type(entry) == 'table' and entry.err then
      return entry
    else
      redis.call('HSET', job, 'position', position)
      if start == '0' then
        now = now or redis.call('TIME')
        redis.call('HSET', job, 'first_token_at', now[1] * 1000 + math.floor(now[2] / 1000))
      end
      if channel ~= '' then
        redis.call('SPUBLISH', channel, event)
      end
      answers[i] = tonumber(position)
    end
  end
end
return answers
