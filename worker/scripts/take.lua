-- Take waiting entries in fair order: by tenant, weighted, in tokens (start-time fair queueing, Goyal et al. 1996).
--
-- KEYS  1 jobs stream  2 fair order  3 shares  4 queue settings
-- ARGV  1 group  2 worker  3 count  4 consumer of what waits  5 most entries to put in order in this call
--       6 1: take some even where more is new, which may belong before them
-- returns {entries, as XRANGE does; 1 where nothing was taken, since there may be more that is new, else 0}
--
-- What is new is delivered to nobody yet: it becomes pending with the consumer `waiting`, and gets its place in
-- the order. A tenant's entries lie as far apart as they cost, so one that floods is far ahead in virtual time,
-- while another's first one starts at the present. Once nothing waits, nobody has a past.

local function index(entries)
  local shares = {}
  local function share(name)
    shares[name] = shares[name] or tonumber(redis.call('HGET', KEYS[3], name) or 0)
    return shares[name]
  end
  local weights = {}
  for _, entry in ipairs(entries) do
    local fields = {}
    for i = 1, #entry[2], 2 do
      fields[entry[2][i]] = entry[2][i + 1]
    end
    local tenant = fields.tenant or ''
    local cost = math.min(math.max(1, tonumber(fields.cost) or #(fields.job or '') / 4), 1e7)
    weights[tenant] = weights[tenant] or tonumber(redis.call('HGET', KEYS[4], 'weight:' .. tenant) or 1) or 1
    local start = math.max(share('now'), share('tenant:' .. tenant))
    shares['tenant:' .. tenant] = start + cost / math.max(weights[tenant], 1e-6)
    redis.call('ZADD', KEYS[2], string.format('%.17g', start), entry[1])
  end
  for name, value in pairs(shares) do
    redis.call('HSET', KEYS[3], name, string.format('%.17g', value))
  end
end

local new = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[4], 'COUNT', ARGV[5], 'STREAMS', KEYS[1], '>')
if new and new[1] then
  index(new[1][2])
  if #new[1][2] == tonumber(ARGV[5]) and ARGV[6] ~= '1' then
    return {{}, 1}
  end
elseif redis.call('EXISTS', KEYS[2]) == 0 then
  -- Should the order ever be lost, so are not the entries that it was of.
  local lost = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[5], ARGV[4])
  for _, pending in ipairs(lost) do
    index(redis.call('XRANGE', KEYS[1], pending[1], pending[1]))
  end
end

local taken = {}
while #taken < tonumber(ARGV[3]) do
  local first = redis.call('ZPOPMIN', KEYS[2], ARGV[3] - #taken)
  if not first[1] then
    redis.call('DEL', KEYS[3])
    break
  end
  local ids = {}
  for i = 1, #first, 2 do
    ids[#ids + 1] = first[i]
  end
  redis.call('HSET', KEYS[3], 'now', first[#first])
  -- Claims nothing for an entry that was cancelled while it waited.
  local claim = {'XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0}
  for _, id in ipairs(ids) do
    claim[#claim + 1] = id
  end
  claim[#claim + 1] = 'RETRYCOUNT'
  claim[#claim + 1] = 1
  for _, entry in ipairs(redis.call(unpack(claim))) do
    taken[#taken + 1] = entry
  end
end
return {taken, 0}
