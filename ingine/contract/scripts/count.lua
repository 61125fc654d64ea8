-- Read a number as our scripts write it into a record: at most 15 digits without a leading zero, so that it is exact as
-- a double, in Python and in msgpack. nil for anything else, since any client may have written it.
local function count(text)
  if text and #text <= 15 and (text == '0' or string.match(text, '^[1-9]%d*$')) then
    return tonumber(text)
  end
end
