-- route_rq: jobs of RQ's producers become tasks. Events route, refuse, adopt, adopt_omitted, adopt_ready, requeue_undone.
--
-- Tasks of ours that RQ's requeue has put there leave the list: requeue.lua has queued them, or they are failed again.
--
-- ARGV: 1 queue id, 2 term, 3 now (unix s), 4 now (ISO), 5 ttl of ended records (s), 6 key of the pilot's own submit
--       context,
--       7 number of different job requests, 8... for each request two: class, packed Spec,
--         and behind them for each job seven: queue, id, 1 (in the list) or 0 (waits for others), 1 (at the front) or 0,
--         number of its request (0: a task of ours, or refused), why it is refused or cannot run again ('' = it is not), the same as
--         RQ shows it.
-- Returns the number of jobs that were still there. An id whose record is gone or not queued is dropped.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local now, now_iso, ttl, shared = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), ARGV[6]
local front, requests, new = {}, {}, 0

local function enter_list(id, class, first)
  if not first then return line_up(id, class) end
  front[class] = front[class] or {}
  table.insert(front[class], id)
end

-- What an earlier end may have left in a record.
local LEFT = {'pq_reason', 'pq_exit', 'pq_cancel', 'pq_cpus', 'pq_node', 'pq_slot', 'pq_running', 'pq_out', 'pq_err',
  'pq_crashes', 'pq_shown'}

-- -- jobs of RQ's producers ---------------------------------------------------------------------------------------------

-- An id that looks like one of ours is never given out by us.
local function reserve(id)
  if #id > 10 or not string.match(id, '^[0-9a-v]+$') then return end
  local number = tonumber(id, 32)
  if number > tonumber(redis.call('GET', 'pilotq:seq') or 0) then
    redis.call('SET', 'pilotq:seq', string.format('%d', number))
  end
end

local function refuse(id, queue, why, shown)
  local kept = rq_ttl(id, 'failed')
  count_end('', 'failed', 1)
  rq_ended(id, queue, now, now_iso)
  journal(cmsgpack.pack({id = id, message = why}),
    {status = 'failed', reason = 'refused', final = true, ended = now, queued = now})
  request_release(id, redis.call('HGET', job_key(id), 'pq_has_dependents'), 'failed')
  redis.call('ZREM', registry('deferred', queue), id)
  if kept == 0 then return redis.call('DEL', job_key(id)) end
  redis.call('HSET', job_key(id), 'status', 'failed', 'origin', queue, 'pq_reason', 'refused', 'ended_at', now_iso)
  if kept > 0 then redis.call('EXPIRE', job_key(id), kept) else redis.call('PERSIST', job_key(id)) end
  redis.call('ZADD', registry('failed', queue), kept > 0 and now + kept or -1, id)
  add_result(id, '2', shown, '', kept)
end

-- What it waits for: {parents that have not ended, whether one of them ended otherwise than it needs}. RQ counts a parent
-- without a record as met: it has finished some time ago.
local function parents_of(id)
  local open, broken = {}, false
  local ends = redis.call('HGET', job_key(id), 'allow_dependency_failures') == '1' and 'kf' or 'k'
  for _, parent in ipairs(redis.call('SMEMBERS', 'rq:job::' .. id .. ':dependencies')) do
    local status = redis.pcall('HGET', job_key(parent), 'status')
    if type(status) ~= 'string' then status = nil end
    local kind = END_LETTERS[status]
    if kind and not string.find(ends, kind, 1, true) then
      broken = true
    elseif status and not kind then
      open[#open + 1] = parent
    end
  end
  return open, broken, ends
end

local function adopt(id, queue, class)
  local open, broken, ends = parents_of(id)
  if broken then return omit(id, now, now_iso, ttl) end
  if #open == 0 then
    redis.call('ZREM', registry('deferred', queue), id)
    forget_parents(id)
    redis.call('HSET', job_key(id), 'status', 'queued', 'origin', class)
    return enter_list(id, class, redis.call('HGET', job_key(id), 'enqueue_at_front') == '1')
  end
  -- The id may be that of a deleted job, which is in the lists of its parents still.
  local wait = redis.call('HGET', job_key(id), 'pq_seq')
  redis.call('HSET', job_key(id), 'pq_wait', wait)
  for _, parent in ipairs(open) do
    local array = redis.call('HGET', job_key(parent), 'pq_array_of')
    redis.call('RPUSH', dependents_key(parent), dependency_on(id .. '#' .. wait, ends))
    redis.call('HSET', job_key(array or parent), array and 'pq_elementwise' or 'pq_has_dependents', '1')
    track_parent(parent)
  end
  redis.call('HSET', job_key(id), 'pq_open_parents', #open)
  redis.call('ZADD', registry('deferred', queue), ADOPTED + now, id)
end

-- `reason`, `queued_at`, `execution`: fields of its record.
local function route_rq_job(item, reason, queued_at, execution)
  local queue, id, request = item.queue, item.id, requests[item.request]
  if reason then
    redis.call('HINCRBY', 'pilotq:counts', counted_as(reason), -1)
    if redis.call('HEXISTS', job_key(id), 'ttl') == 0 then redis.call('PERSIST', job_key(id)) end
  end
  if reason or queued_at or execution then redis.call('HDEL', job_key(id), unpack(LEFT)) end
  reserve(id)
  if not request then
    rq_count_in(id, now)
    return refuse(id, queue, item.why, item.shown)
  end
  local fields = {'pq_class', request.class, 'pq_spec', request.spec, 'pq_shared', shared, 'pq_sub', '', 'pq_seq', next_place()}
  local function add(field, value)
    fields[#fields + 1] = field
    fields[#fields + 1] = value
  end
  if not queued_at then add('pq_queued_at', now) end
  if not execution then add('pq_exec', '0') end
  if item.listed then
    add('status', 'queued')
    add('origin', request.class)
  end
  redis.call('HSET', job_key(id), unpack(fields))
  if not queued_at then new = new + 1 end
  if not item.listed then return adopt(id, queue, request.class) end
  enter_list(id, request.class, item.first)
end

-- -- tasks of ours, requeued by RQ's tools ------------------------------------------------------------------------------

-- It cannot run again: it stays what it was, and says why.
local function undo(item)
  redis.call('HSET', job_key(item.id), 'status', 'failed', 'origin', item.queue)
  redis.call('ZADD', registry('failed', item.queue), now + ttl, item.id)
  redis.call('EXPIRE', job_key(item.id), ttl)
  add_result(item.id, '2', item.shown, '', ttl)
end

for i = 1, tonumber(ARGV[7]) do
  requests[i] = {class = ARGV[6 + 2 * i], spec = ARGV[7 + 2 * i]}
end
local number = 0
for i = 8 + 2 * #requests, #ARGV, 7 do
  local item = {queue = ARGV[i], id = ARGV[i + 1], listed = ARGV[i + 2] == '1', first = ARGV[i + 3] == '1',
    request = tonumber(ARGV[i + 4]), why = ARGV[i + 5], shown = ARGV[i + 6]}
  -- What requeue.lua has queued meanwhile is in its class list, and has left only its place here.
  local there = not item.listed or redis.pcall('LREM', list_key(item.queue), 1, item.id) == 1
  local v = redis.pcall('HMGET', job_key(item.id), 'status', 'pq_sub', 'pq_reason', 'pq_queued_at', 'pq_exec')
  if v.err then v = {} end
  if there and v[1] == (item.listed and 'queued' or 'deferred') and pcall(text_in, 'id', item.id) then
    number = number + 1
    if (v[2] or '') == '' then
      guarded({now, now_iso, ttl}, item.id, route_rq_job, item, unpack(v, 3, 5))
    elseif item.why ~= '' then
      undo(item)
    end
  elseif not item.listed then
    redis.call('ZREM', registry('deferred', item.queue), item.id)
  end
end
if new > 0 then redis.call('HINCRBY', 'pilotq:counts', 'total', new) end
flush_ready()
for class, ids in pairs(front) do
  offer(class)
  for k = #ids, 1, -1 do redis.call('LPUSH', list_key(class), ids[k]) end
end
flush_tally(ttl)
flush_lines()
if number > 0 then wake() end
return number
