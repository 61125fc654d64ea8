-- Take waiting entries in an order that is fair between tenants, by weight and in tokens (start-time fair queueing,
-- Goyal et al. 1996).
--
-- KEYS  1 jobs stream  2 fair order  3 virtual ends  4 queue settings
-- ARGV  1 group  2 worker  3 free places  4 consumer of waiting entries  5 most new entries to put in order in this call
--       6 1: take entries even if there are more new ones, which may belong before them
--       7 highest cost of a choice  8 most bytes of an entry
-- returns {entries as XRANGE does, and of one that has more bytes, its id and number of bytes;
--          1 if nothing was taken, since there may be more new entries, else 0}
--
-- Each choice of a job takes one place: entries are taken while one is free, so the last may have more choices than
-- there are free places.
--
-- A new entry becomes pending with the consumer `waiting`, and gets its place in the order: a virtual start time. The
-- starts of one tenant's entries are apart by what they cost, so a tenant that submits many is far ahead in virtual
-- time, while the first entry of another starts at the present. When no entry waits, all virtual times are dropped.
--
-- The virtual ends are kept only for tenants that are ahead of the present, which is the member `now`: a tenant that
-- is not ahead counts as unknown, and the next call removes it. So they are about as many as the tenants with waiting
-- entries.

-- include: within.lua
-- include: count.lua
-- include: choices.lua

local MAX_TENANT = 128

-- If a key holds another type, delete it: the order can be rebuilt.
for _, key in ipairs({KEYS[2], KEYS[3]}) do
  if type(redis.pcall('ZCARD', key)) ~= 'number' then
    redis.call('DEL', key)
  end
end

local function score(value)
  return string.format('%.17g', value)
end

local function finite(text)
  local number = tonumber(text)
  return number and number == number and math.abs(number) < math.huge and number
end

-- The cost in tokens. If the entry has no valid one, it is estimated from the job's bytes.
local function cost_of(fields, entry)
  local cost = finite(fields.cost)
  if not cost or cost < 0 then
    cost = #(fields.job or '') / 4
  end
  return math.max(1, math.min(cost, tonumber(ARGV[7]) * num_choices(entry)))
end

local function weight_of(tenant)
  local given = redis.pcall('HGET', KEYS[4], 'weight:' .. tenant)
  local weight = finite(type(given) == 'string' and given or 1)
  return weight and weight > 0 and math.max(weight, 1e-6) or 1
end

local function index(entries)
  local ends = {}
  local now = finite(redis.call('ZSCORE', KEYS[3], 'now') or 0) or 0
  for _, entry in ipairs(entries) do
    local fields = {}
    for i = 1, #entry[2], 2 do
      fields[entry[2][i]] = entry[2][i + 1]
    end
    -- Any client may have written the entry: a name that no job can have counts as no tenant.
    local tenant = fields.tenant and #fields.tenant <= MAX_TENANT and fields.tenant or ''
    local member = 'tenant:' .. tenant
    local start = math.max(now, ends[member] or finite(redis.call('ZSCORE', KEYS[3], member) or 0) or 0)
    ends[member] = start + cost_of(fields, entry) / weight_of(tenant)
    redis.call('ZADD', KEYS[2], score(start), entry[1])
  end
  for member, value in pairs(ends) do
    redis.call('ZADD', KEYS[3], score(value), member)
  end
end

local new = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[4], 'COUNT', ARGV[5], 'STREAMS', KEYS[1], '>')
if new and new[1] then
  index(new[1][2])
  if #new[1][2] == tonumber(ARGV[5]) and ARGV[6] ~= '1' then
    return {{}, 1}
  end
elseif redis.call('EXISTS', KEYS[2]) == 0 then
  -- If the order was lost, rebuild it from the waiting entries.
  local lost = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[5], ARGV[4])
  for _, pending in ipairs(lost) do
    index(redis.call('XRANGE', KEYS[1], pending[1], pending[1]))
  end
end

local taken, left = {}, tonumber(ARGV[3])
local now
while left > 0 do
  local first = redis.call('ZPOPMIN', KEYS[2])
  if not first[1] then
    redis.call('DEL', KEYS[3])
    now = nil
    break
  end
  now = first[2]
  -- XCLAIM claims nothing for an entry that was cancelled while it waited, or for an id of no entry. FORCE also claims
  -- an entry that is pending with no consumer, since the consumer `waiting` was deleted.
  local claimed = redis.pcall('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, first[1], 'RETRYCOUNT', 1, 'FORCE')
  local entry = not claimed.err and claimed[1] and within(ARGV[8], claimed[1])
  if entry then
    taken[#taken + 1] = entry
    left = left - num_choices(entry)
  end
end
if now then
  redis.call('ZADD', KEYS[3], now, 'now')
  redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', '(' .. now)
end
return {taken, 0}
