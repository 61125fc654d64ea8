-- An entry of a stream; or where its fields have more than `most` bytes, its id and how many: whoever may submit
-- decides how many these are, and no worker must have to read them.
local function within(most, entry)
  local num_bytes = 0
  for _, part in ipairs(entry[2] or {}) do
    num_bytes = num_bytes + #part
  end
  return num_bytes <= tonumber(most) and entry or {entry[1], num_bytes}
end
