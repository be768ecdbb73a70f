-- commit: a staged submit becomes visible, whole or not at all. Events commit, commit_deferred, commit_omitted.
--
-- The client has written the hashes of all tasks (status queued or deferred) with a TTL; nothing refers to them yet.
-- ARGV: 1 queue id, 2 submission key, 3 now (unix s), 4 now (ISO), 5 first task number, 6 number of records,
--       7 number of tasks, 8 ttl of canceled records (s), 9 msgpack {
--         groups = [[class, [id, ...]], ...]      go straight to their lists
--         waits  = [[id, class, [parent, ...], number of tasks], ...]    wait for whole tasks
--         elementwise = [[array id, class, [parent array, ...], number of tasks], ...] wait element by element
--         extra  = [key, ...]                                          other staged keys that are to stay
--         shared = key of what all of them share
--         past   = {parent = status}: parents that only the journal knows
--       }
-- A parent is a task, an array, or one element of an array (<array>_<index>).
-- Returns {'ok'}; {'again', first number, number} when this key was committed before (nothing is written);
--       {'gone'} when a staged key has expired; {'unknown', [id, ...]} when parents do not exist; {'unequal', id} when a
--       parent to wait for element by element is no array of as many elements.
if not queue_id_ok() then return queue_id_error() end
local key, now, now_iso, first, records, total, ttl = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local known = redis.call('HMGET', submit_key(key), 'first', 'records')
if known[1] then return {'again', known[1], known[2]} end
local work = cmsgpack.unpack(ARGV[9])

-- 1. Read: are all hashes there, and what became of the parents?
local found, all = 0, {}
for _, group in ipairs(work.groups) do for _, id in ipairs(group[2]) do all[#all + 1] = job_key(id) end end
for _, item in ipairs(work.waits) do all[#all + 1] = job_key(item[1]) end
for _, item in ipairs(work.elementwise) do all[#all + 1] = job_key(item[1]) end
for _, name in ipairs(work.extra) do all[#all + 1] = name end
all[#all + 1] = 'pilotq:shared:' .. work.shared
for i = 1, #all, PIECE do found = found + redis.call('EXISTS', unpack(all, i, math.min(i + PIECE - 1, #all))) end
if found ~= #all then return {'gone'} end
local parents, elements, counts = {}, {}, {}
-- The status of a parent. Elements have no record of their own before they run and after they finished.
local function status_of(parent)
  local status = redis.pcall('HGET', job_key(parent), 'status')
  if type(status) == 'table' then return false end -- a stranger's key
  redis.call('LLEN', dependents_key(parent)) -- what cannot be written to raises here, and not between two writes
  redis.call('LLEN', elementwise_key(parent))
  local array, index = string.match(parent, '^(.-)_(%d+)$')
  -- Jobs of RQ's producers may be called as elements are.
  if not array or status and not redis.call('HGET', job_key(parent), 'pq_array_of') then
    counts[parent] = select(3, span_of(redis.call('HGET', job_key(parent), 'pq_array')))
    return status
  end
  local start, step, count = span_of(redis.pcall('HMGET', job_key(array), 'pq_array')[1])
  if not start then return false end
  local position = (index - start) / step
  if position < 0 or position >= count or position % 1 ~= 0 then return false end
  elements[parent] = array
  local outcome = redis.call('BITFIELD', outcomes_key(array), 'GET', 'u2', '#' .. string.format('%d', position))[1]
  return ({[0] = 'queued', 'finished', 'failed', 'canceled'})[outcome]
end
local unknown = {}
for _, items in ipairs({work.waits, work.elementwise}) do
  for _, item in ipairs(items) do
    for _, parent in ipairs(item[3]) do
      if parents[parent] == nil then
        parents[parent] = status_of(parent) or (work.past or {})[parent] or false
        if not parents[parent] then unknown[#unknown + 1] = parent end
      end
    end
  end
end
if #unknown > 0 then return {'unknown', unknown} end

for _, item in ipairs(work.elementwise) do
  for _, parent in ipairs(item[3]) do
    if counts[parent] ~= item[4] then return {'unequal', parent} end
  end
end

-- 2. Write.
for _, name in ipairs(all) do redis.call('PERSIST', name) end
redis.call('HSET', submit_key(key), 'first', first, 'records', records, 'total', total, 'left', total,
  'shared', work.shared)
redis.call('ZADD', 'pilotq:submissions', first, key)
count_up('pilotq:shared-refs', work.shared, 1)
count_up('pilotq:counts', 'total', total)
local known_queues = {}
local function know(class)
  local queue = queue_of(class)
  if not known_queues[queue] then redis.call('SADD', 'rq:queues', list_key(queue)) end
  known_queues[queue] = true
end
local function ready(class, ids)
  offer(class)
  push('RPUSH', list_key(class), ids)
end
for _, group in ipairs(work.groups) do
  know(group[1])
  ready(group[1], group[2])
end
local omitted = {}
for _, item in ipairs(work.waits) do
  local id, class, left, broken = item[1], item[2], 0, false
  know(class)
  for _, parent in ipairs(item[3]) do
    local status = parents[parent]
    if status == 'failed' or status == 'stopped' or status == 'canceled' or omitted[elements[parent]] then broken = true end
  end
  if broken then
    omit(id, now, now_iso, ttl)
    parents[id], omitted[id] = 'canceled', true
  else
    for _, parent in ipairs(item[3]) do
      if parents[parent] ~= 'finished' then
        left = left + 1
        redis.call('RPUSH', dependents_key(parent), id)
        track_parent(parent)
        if elements[parent] then
          redis.call('HSET', job_key(elements[parent]), 'pq_elementwise', '1')
        else
          redis.call('HSET', job_key(parent), 'pq_has_dependents', '1')
        end
      end
    end
    if left == 0 then
      redis.call('HSET', job_key(id), 'status', 'queued', 'origin', class)
      ready(class, {id})
    else
      redis.call('HSET', job_key(id), 'pq_open_parents', left, 'origin', queue_of(class))
      redis.call('ZADD', registry('deferred', queue_of(class)), ADOPTED + now, id)
    end
  end
end
for _, item in ipairs(work.elementwise) do
  local id, class = item[1], item[2]
  know(class)
  redis.call('HSET', job_key(id), 'origin', queue_of(class), 'pq_parents', #item[3])
  redis.call('ZADD', registry('deferred', queue_of(class)), ADOPTED + now, id)
  for number, parent in ipairs(item[3]) do
    redis.call('RPUSH', elementwise_key(parent), (number - 1) .. ':' .. id)
    track_parent(parent)
    redis.call('HSET', job_key(parent), 'pq_elementwise', '1')
    local status = parents[parent]
    if status == 'finished' or status == 'failed' or status == 'canceled' then redis.call('EXPIRE', elementwise_key(parent), ttl) end
    -- Elements of the parent that ended before this commit woke nobody for us: look at all of them once.
    if redis.call('EXISTS', outcomes_key(parent)) == 1 then
      redis.call('RPUSH', 'pilotq:release', string.format('e:%s:0:%d', parent, item[4] - 1))
    end
  end
end
flush_tally(ttl)
flush_lines()
wake()
return {'ok'}
