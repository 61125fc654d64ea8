-- True if the server will always refuse a call, because of the key: it holds another type, or a stream that has no id
-- left for the new entry. All other errors (no memory, no disk) are temporary.
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
