-- Which of these calls the server would refuse to us: it does not know the command, or our user may not run it.
--
-- ARGV  a call each, words parted by spaces
-- returns those refused; none on a server that cannot tell

local refused = {}
if not redis.acl_check_cmd then
  return refused
end
for _, line in ipairs(ARGV) do
  local call = {}
  for word in string.gmatch(line, '%S+') do
    call[#call + 1] = word
  end
  local known, may = pcall(redis.acl_check_cmd, unpack(call))
  if not known or may ~= true then
    refused[#refused + 1] = line
  end
end
return refused
