-- count_vanished: tasks whose records somebody deleted while they waited count as canceled, as soon as nothing is left that
-- waits or runs. Without that a wait for all tasks would never end.
--
-- A call looks at about WALK_MAX classes and rate limits; the next one goes on. What got into a class list in between stands in
-- pilotq:classes:changed, which the caller leaves alone meanwhile: with something in there the walk ends.
-- ARGV: 1 queue id, 2 term, 3 ttl of ended submissions (s), 4 what is walked through (classes, limits), 5 cursor of that walk,
--       6... queues.
-- Returns {number of such tasks, what to go on with, cursor}; an empty text when it is done.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local WALK_MAX, seen = 2000, 0
local stage, cursor = ARGV[4], ARGV[5]
local v = redis.call('HMGET', 'pilotq:counts', 'total', 'finished', 'failed', 'canceled')
for i = 1, 4 do v[i] = tonumber(v[i] or '') or 0 end
local left = v[1] - v[2] - v[3] - v[4]
if left <= 0 or redis.call('EXISTS', 'pilotq:release', LEASES) > 0 then return {0, '', ''} end
if (stage ~= 'classes' or cursor ~= '0') and redis.call('EXISTS', 'pilotq:classes:changed') == 1 then return {0, '', ''} end
for i = 6, #ARGV do
  local open = redis.call('EXISTS', list_key(ARGV[i]), registry('wip', ARGV[i]), registry('deferred', ARGV[i]),
    registry('scheduled', ARGV[i]), registry('ready', ARGV[i]))
  if open > 0 then return {0, '', ''} end
end

-- One page of a walk: whether one of these keys is there.
local function is_open(page, step, key_of)
  cursor, seen = page[1], seen + #page[2] / step
  for k = 1, #page[2], step do
    if redis.call('EXISTS', key_of(page[2][k])) == 1 then return true end
  end
end

while stage == 'classes' do
  if seen >= WALK_MAX then return {0, stage, cursor} end
  if is_open(redis.call('HSCAN', 'pilotq:classes', cursor, 'COUNT', 500), 2, list_key) then return {0, '', ''} end
  if cursor == '0' then stage = 'limits' end
end
repeat
  if seen >= WALK_MAX then return {0, stage, cursor} end
  local page = redis.call('SSCAN', 'rq:rl-keys', cursor, 'COUNT', 500)
  if is_open(page, 1, function(name) return 'rq:rl:' .. name .. ':rate_limited' end) then return {0, '', ''} end
until cursor == '0'
-- Submissions that have not ended miss these; of very many the others do so in the next round.
local number, keys = 0, redis.call('ZRANGE', 'pilotq:submissions', 0, 999)
for _, key in ipairs(keys) do
  local open = redis.pcall('HMGET', submit_key(key), 'left')[1]
  local missing = math.min(tonumber(open or '') or 0, left - number)
  if missing > 0 then count_end(key, 'canceled', missing) else redis.call('ZREM', 'pilotq:submissions', key) end
  number = number + math.max(missing, 0)
end
if #keys < 1000 then
  count_end('', 'canceled', left - number)
  number = left
end
flush_tally(ARGV[3])
return {number, '', ''}
