-- Find the commands that the server would refuse to us: it does not know them, or our user may not run them.
--
-- ARGV  commands with their arguments, separated by spaces
-- returns those that it would refuse; none on a server that cannot check that

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
