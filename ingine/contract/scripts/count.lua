-- A number as our scripts write it into a record: digits without a leading zero, at most 15, so that it is exact as a
-- double, in Python and in msgpack. nil for anything else: anybody may have written it.
local function count(text)
  if text and #text <= 15 and (text == '0' or string.match(text, '^[1-9]%d*$')) then
    return tonumber(text)
  end
end
