-- release: dependents of ended tasks are queued, or omitted. Events release, omit.
--
-- One call takes one entry from pilotq:release and handles at most `limit` dependents of it; the rest stays for the next.
-- Entries: 'k:<id>' a task or array ended, its whole-task dependents wait in pilotq:kids:<id>;
--   'e:<array>:<position>' an element ended, arrays wait element by element in pilotq:each:<array>;
--   's:<array>:<number>:<child>:<position>' look at elements of the array from this position on for one new child.
-- ARGV: 1 epoch, 2 term, 3 now (unix s), 4 now (ISO), 5 limit, 6 ttl of canceled records (s).
-- Returns {number handled, entries left}.
if not epoch_ok() then return epoch_error() end
if not term_ok() then return term_error() end
local now, now_iso, limit, ttl = ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local ready = {}

local function queue_up(id, class)
  redis.call('HSET', job_key(id), 'status', 'queued', 'origin', class)
  ready[class] = ready[class] or {}
  table.insert(ready[class], id)
end

local function omit(id, v)
  local class = v[2]
  local count = v[6] and tonumber(string.match(v[6], '(%d+)$')) or 1
  redis.call('ZREM', registry('deferred', queue_of(class)), id)
  end_unrun(id, {name = v[3], submission = v[4], queued = v[5]}, 'canceled', 'dependency', now, now_iso, ttl, count)
  redis.call('ZADD', registry('canceled', queue_of(class)), now, id)
  if v[7] then redis.call('RPUSH', 'pilotq:release', 'k:' .. id) end
end

local function release_kids(parent, good)
  local kids = redis.call('LPOP', kids_key(parent), limit) or {}
  for _, id in ipairs(kids) do
    local v = redis.call('HMGET', job_key(id), 'status', 'pq_class', 'pq_name', 'pq_sub', 'pq_at', 'pq_array', 'pq_kids')
    if v[1] == 'deferred' then
      if not good then
        omit(id, v)
      elseif redis.call('HINCRBY', job_key(id), 'pq_waits', -1) <= 0 then
        redis.call('ZREM', registry('deferred', queue_of(v[2])), id)
        queue_up(id, v[2])
      end
    end
  end
  return #kids, redis.call('EXISTS', kids_key(parent)) == 1
end

-- Parent `number` of the child's element at `position` has ended with `outcome` (two bits).
local function release_element(child, number, position, outcome)
  local v = redis.call('HMGET', job_key(child), 'status', 'pq_class', 'pq_parents', 'pq_array', 'data', 'description',
    'created_at', 'pq_sub', 'pq_retries', 'pq_cancel')
  if not v[1] or v[10] or position >= tonumber(string.match(v[4], '(%d+)$')) then return end
  if redis.call('BITFIELD', bits_key(child), 'GET', 'u2', '#' .. position)[1] ~= 0 then return end
  if outcome ~= 1 then
    set_bits(child, position, position, 3)
    count_end(v[8], 'canceled', 1)
    array_ended(child, 1, 1, now, now_iso, ttl, ttl)
    if redis.call('HGET', job_key(child), 'pq_each') then
      redis.call('RPUSH', 'pilotq:release', 'e:' .. child .. ':' .. string.format('%d', position))
    end
    return
  end
  -- A bit for each parent, so that an element seen twice counts once.
  local field = 'w' .. string.format('%d', position)
  local seen = bit.bor(tonumber(redis.call('HGET', each_key(child) .. ':seen', field) or 0), bit.lshift(1, number))
  redis.call('HSET', each_key(child) .. ':seen', field, seen)
  if seen ~= bit.lshift(1, tonumber(v[3])) - 1 then return end
  redis.call('HDEL', each_key(child) .. ':seen', field)
  if v[1] == 'deferred' then
    redis.call('ZREM', registry('deferred', queue_of(v[2])), child)
    redis.call('HSET', job_key(child), 'status', 'started', 'started_at', now_iso,
      'pq_next', string.match(v[4], '(%d+)$'))
    redis.call('ZADD', registry('wip', queue_of(v[2])), 'inf', child .. ':0')
  end
  local index = string.match(v[4], '^(%d+)') + position * string.match(v[4], ':(%d+):')
  if redis.call('EXISTS', job_key(child .. '_' .. string.format('%d', index))) == 1 then return end
  local id = make_element(child, position, {array = v[4], data = v[5], description = v[6], created = v[7], submission = v[8], class = v[2]},
    {'status', 'queued', 'pq_exec', '0', 'pq_retries', v[9] or '0'})
  queue_up(id, v[2])
end

local function release_each(array, position)
  local outcome = redis.call('BITFIELD', bits_key(array), 'GET', 'u2', '#' .. position)[1]
  local children = redis.call('LRANGE', each_key(array), 0, -1)
  for _, entry in ipairs(children) do
    local number, child = string.match(entry, '^(%d+):(.*)$')
    release_element(child, tonumber(number), position, outcome)
  end
  local start, step = string.match(redis.call('HGET', job_key(array), 'pq_array') or '0:1:0', '^(%d+):(%d+):')
  local element = array .. '_' .. string.format('%d', start + position * step)
  local handled, more = release_kids(element, outcome == 1)
  if more then redis.call('LPUSH', 'pilotq:release', 'e:' .. array .. ':' .. string.format('%d', position)) end
  return #children + handled
end

local function scan_elements(array, number, child, position)
  local stop = position + limit
  local count = tonumber(string.match(redis.call('HGET', job_key(array), 'pq_array') or '0', '(%d+)$'))
  while position < math.min(stop, count) do
    local outcome = redis.call('BITFIELD', bits_key(array), 'GET', 'u2', '#' .. position)[1]
    if outcome ~= 0 then release_element(child, number, position, outcome) end
    position = position + 1
  end
  if position < count then
    redis.call('LPUSH', 'pilotq:release', table.concat({'s', array, number, child, string.format('%d', position)}, ':'))
  end
  return limit
end

local handled = 0
while handled < limit do
  local entry = redis.call('LPOP', 'pilotq:release')
  if not entry then break end
  local kind, rest = string.match(entry, '^(%a):(.*)$')
  if kind == 'k' then
    local number, more = release_kids(rest, redis.call('HGET', job_key(rest), 'status') == 'finished')
    if more then redis.call('LPUSH', 'pilotq:release', entry) end
    handled = handled + 1 + number
  elseif kind == 'e' then
    local array, position = string.match(rest, '^(.*):(%d+)$')
    handled = handled + 1 + release_each(array, tonumber(position))
  else
    local array, number, child, position = string.match(rest, '^(.-):(%d+):(.-):(%d+)$')
    handled = handled + scan_elements(array, tonumber(number), child, tonumber(position))
  end
end
for class, ids in pairs(ready) do
  redis.call('SADD', 'rq:queues', list_key(class))
  push('RPUSH', list_key(class), ids)
end
flush_tally(ttl)
flush_lines()
return {handled, redis.call('LLEN', 'pilotq:release')}
