-- Whether the server refuses a call for ever, since somebody has put something else under its key: another type, or a
-- stream that has no id left for what is to be written. Whatever else it refuses for (no memory, no disk) will pass.
local function never_passes(reply)
  local why = type(reply) == 'table' and reply.err
  if not why then
    return false
  end
  for _, sign in ipairs({'WRONGTYPE', 'smaller than the target', 'exhausted the last possible ID'}) do
    if string.find(tostring(why), sign, 1, true) then
      return true
    end
  end
  return false
end
