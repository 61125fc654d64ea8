-- Return an entry of a stream, or, if its fields have more than `most` bytes, its id and number of bytes. Any client
-- that submits chooses the size of an entry, and no worker must have to read a very large one.
local function within(most, entry)
  local num_bytes = 0
  for _, part in ipairs(entry[2] or {}) do
    num_bytes = num_bytes + #part
  end
  return num_bytes <= tonumber(most) and entry or {entry[1], num_bytes}
end
