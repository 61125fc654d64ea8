-- Return how many choices the job of an entry has, by the entry's field `choices`: from 1 to 128, and 1 without the
-- field. Any client may have written it. An entry whose fields were too large to return counts as 1.
--
-- Needs count.lua.
local MAX_CHOICES = 128

local function num_choices(entry)
  local fields, number = entry[2], nil
  for i = 1, type(fields) == 'table' and #fields or 0, 2 do
    if fields[i] == 'choices' then
      number = count(fields[i + 1])
    end
  end
  return math.max(1, math.min(number or 1, MAX_CHOICES))
end
