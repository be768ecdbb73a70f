-- count_vanished: tasks whose records somebody deleted while they waited count as canceled, as soon as nothing is left that
-- waits or runs. Without that a wait for all tasks would never end.
--
-- ARGV: 1 queue id, 2 term, 3 ttl of ended submissions (s), 4... queues.
-- Returns the number of such tasks.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local v = redis.call('HMGET', 'pilotq:counts', 'total', 'finished', 'failed', 'canceled')
for i = 1, 4 do v[i] = tonumber(v[i] or '') or 0 end
local left = v[1] - v[2] - v[3] - v[4]
if left <= 0 or redis.call('EXISTS', 'pilotq:release') == 1 then return 0 end
for i = 4, #ARGV do
  local open = redis.call('EXISTS', list_key(ARGV[i]), registry('wip', ARGV[i]), registry('deferred', ARGV[i]),
    registry('scheduled', ARGV[i]), registry('ready', ARGV[i]))
  if open > 0 then return 0 end
end
local cursor = '0'
repeat
  local page = redis.call('HSCAN', 'pilotq:classes', cursor, 'COUNT', 500)
  cursor = page[1]
  for k = 1, #page[2], 2 do
    if redis.call('EXISTS', list_key(page[2][k])) == 1 then return 0 end
  end
until cursor == '0'
for _, key in ipairs(redis.call('SMEMBERS', 'rq:rl-keys')) do
  if redis.call('EXISTS', 'rq:rl:' .. key .. ':rate_limited') == 1 then return 0 end
end
-- Submissions that have not ended miss these; of very many the others do so in the next call.
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
return number
