-- Copy an entry of a jobs stream to the dead letters: its job, and the fields with which `requeue` restores it.
--
-- why  code, reason, deliveries, worker
-- job  its bytes, in case the entry is gone or has no field `job`
-- returns nil, or the server's error
local function copy_to_dead_letters(dead, jobs, entry, why, job)
  local letter = {'XADD', dead, '*', 'job', job, 'code', why.code, 'reason', why.reason, 'stream', jobs,
    'entry', entry, 'deliveries', why.deliveries, 'worker', why.worker}
  local found = redis.pcall('XRANGE', jobs, entry, entry)[1]
  for i = 1, found and #found[2] or 0, 2 do
    local name, value = found[2][i], found[2][i + 1]
    if name == 'job' then
      letter[5] = value
    elseif name == 'tenant' or name == 'cost' or name == 'choices' then
      letter[#letter + 1] = name
      letter[#letter + 1] = value
    end
  end
  local written = redis.pcall(unpack(letter))
  return type(written) == 'table' and written.err and written or nil
end
