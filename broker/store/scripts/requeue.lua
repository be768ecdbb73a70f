-- requeue: tasks that have ended, and not finished, run again. Events requeue, requeue_deferred.
--
-- The next execution gets the next number, so that a late report of an earlier one counts for nothing. What RQ's own
-- requeue has set to queued (its outcome still stands in pq_reason) is treated like any other.
-- ARGV: 1 queue id, 2 now (unix s), 3 now (ISO),
--       4 msgpack [[id], ...]; of an array that has ended, as a whole: [id, sha1 of its outcomes, number of the argument
--         that has its outcomes as they are to be, number failed, number canceled, position of the first to run, [elements that
--         have a record]],
--       5... outcomes of arrays.
-- Returns for each, or for the first ones only when they are much work: 'queued', 'deferred' (what it depends on has not ended;
--       of very many parents that is looked at later), 'dependency' (what it depends on has not
--       ended as required), 'gone' (something that it needs was forgotten), 'ending' (it was canceled, and runs still), 'changed'
--       (the outcomes are others: read them again), 'damaged' (its record cannot be used), 'unknown', or its status when there
--       is nothing to run again.
if not queue_id_ok() then return queue_id_error() end
local now, now_iso = ARGV[2], ARGV[3]

local WORK_MAX, work = 2000, 0 -- of one call: a task counts WORK_OF_TASK, each of its parents one
local WORK_OF_TASK = 8
local MANY = 8000 -- bytes of a list of parents: those of a longer one are looked at by release_dependents.lua, in slices

-- Are the submission's record and what its tasks share there?
local function needs_there(submission)
  local shared = redis.call('HGET', submit_key(submission or ''), 'shared')
  return shared and redis.call('EXISTS', 'pilotq:shared:' .. shared) == 1
end

-- The reverse of count_end.
local function uncount(submission, field, number)
  if number == 0 then return end
  count_up('pilotq:counts', field, -number)
  count_up(submit_key(submission), field, -number)
  if count_up(submit_key(submission), 'left', number) == number then
    local shared = redis.call('HGET', submit_key(submission), 'shared')
    redis.call('PERSIST', submit_key(submission))
    redis.call('ZADD', 'pilotq:submissions', tonumber(redis.call('HGET', submit_key(submission), 'first') or '') or 0, submission)
    redis.call('PERSIST', 'pilotq:shared:' .. shared)
    count_up('pilotq:shared-refs', shared, 1)
  end
end

local function note(id, name, submission, array, index)
  journal(cmsgpack.pack({id = id, name = printable(name), submission = printable(submission), array = array or '', index = index}),
    {status = 'queued', reason = '', final = false})
end

-- What is to be waited for, see open_parents; of very many it is not known yet.
local function parents_of(after, omitted)
  work = work + #(after or '') / MANY
  if #(after or '') > MANY then return {}, true end
  local open, number = open_parents(after, 1, MANY, omitted)
  work = work + number
  return open, false
end

local function wait_for(id, class, parents, many)
  redis.call('HSET', job_key(id), 'status', 'deferred', 'origin', queue_of(class), 'pq_open_parents', many and 1 or #parents)
  redis.call('ZADD', registry('deferred', queue_of(class)), ADOPTED + now, id)
  local wait = string.format('%d', (tonumber(redis.call('HGET', job_key(id), 'pq_wait') or '') or 0) + 1)
  redis.call('HSET', job_key(id), 'pq_wait', wait)
  wait_for_all(id, wait, parents)
  if many then redis.call('RPUSH', 'pilotq:release', string.format('w:%s:%s:1', id, wait)) end
  return 'deferred'
end

-- A record that has ended is one that waits again.
local function revive(id, queue)
  redis.call('PERSIST', job_key(id))
  joins.requeue(id)
  redis.call('HDEL', job_key(id), 'pq_reason', 'pq_exit', 'pq_cpus', 'pq_cancel', 'pq_crashes', 'pq_node', 'pq_slot',
    'pq_running', 'pq_out', 'pq_err', 'worker_name', 'started_at', 'ended_at', 'pq_excuses', 'pq_suspect_node', 'pq_stopped')
  local budget = redis.call('HGET', job_key(id), 'pq_budget')
  if budget then redis.call('HSET', job_key(id), 'pq_retries', budget) end
  -- RQ's own requeue has written the same in another form.
  redis.call('HSET', job_key(id), 'enqueued_at', now_iso, 'data', OWN_DATA)
  redis.call('ZREM', registry('failed', queue), id)
  redis.call('ZREM', registry('canceled', queue), id)
end

local function requeue_task(id, v)
  local status, class, submission = v[1], v[2], v[3]
  local requeued = status == 'queued' and v[7]
  if not requeued and not bad(status) then return status end
  if status == 'canceled' and redis.call('TTL', job_key(id)) < 0 then return 'ending' end
  local parents, many = parents_of(v[5], v[7] == 'dependency')
  if not parents then return 'dependency' end
  class_in(class)
  if not needs_there(submission) then return 'gone' end
  local canceled = status == 'canceled' or requeued and counted_as(v[7]) == 'canceled'
  revive(id, queue_of(class))
  uncount(submission, canceled and 'canceled' or 'failed', 1)
  note(id, v[4], submission)
  if many or #parents > 0 then return wait_for(id, class, parents, many) end
  return queue_up(id, class)
end

-- Every element of an array (positions) whose parents' elements have ended is looked at by release_dependents.lua.
local function look_again(id, parents, first, last)
  for parent in string.gmatch(parents, '%S+') do
    look_at(parent, first, last)
  end
end

local function all_there(parents)
  for parent in string.gmatch(parents or '', '%S+') do
    if redis.call('EXISTS', job_key(parent), elementwise_key(parent)) < 2 then return false end
  end
  return true
end

local ARRAY = {'status', 'pq_class', 'pq_sub', 'pq_name', 'pq_after', 'pq_next', 'pq_parents', 'pq_cancel', 'data',
  'description', 'created_at', 'pq_retries', 'pq_first_attempt', 'pq_last_attempt', 'pq_reason', 'pq_left', 'pq_unfinished', 'pq_kept',
  'pq_stopped'}

local function read_array(id)
  local v, f = redis.call('HMGET', job_key(id), unpack(ARRAY)), {}
  for i, name in ipairs(ARRAY) do f[string.match(name, '^p?q?_?(.*)$')] = v[i] end
  f.array = text_of(id)
  if not f.array then return nil end
  class_in(f.class)
  f.count = count_in(f.array)
  for _, name in ipairs({'left', 'unfinished', 'kept'}) do number_in('pq_' .. name, f[name], 0) end
  f.next, f.retries = number_in('pq_next', f.next), tostring(number_in('pq_retries', f.retries, 0))
  f.ended = (bad(f.status) or f.status == 'finished') and redis.call('TTL', job_key(id)) >= 0
    or f.status == 'queued' and f.reason and true
  -- The highest number an execution of an element has had.
  f.last = math.max(number_in('pq_first_attempt', f.first_attempt, 1), number_in('pq_last_attempt', f.last_attempt, 1))
  return f
end

-- Why nothing of an array can run again; nil if it can.
local function hindrance(f)
  if (f.cancel or f.stopped or f.status == 'canceled') and not f.ended then return 'ending' end
  if f.parents and not all_there(f.after) or not needs_there(f.sub) then return 'gone' end
  if not f.parents and not parents_of(f.after, f.reason == 'dependency') then return 'dependency' end
end

local function reopen(id, f)
  revive(id, queue_of(f.class))
  for _, key in ipairs(array_keys(id)) do redis.call('PERSIST', key) end
end

local function requeue_array(id, item)
  local f = read_array(id)
  if not f.ended or f.status == 'finished' or item[4] + item[5] == 0 then return f.status end
  if redis.sha1hex(redis.call('GET', outcomes_key(id)) or '') ~= item[2] then return 'changed' end
  local why = hindrance(f)
  if why then return why end
  reopen(id, f)
  push('ZREM', registry('failed', queue_of(f.class)), item[7])
  for first = 1, #item[7], PIECE do
    local records = {}
    for k = first, math.min(first + PIECE - 1, #item[7]) do records[#records + 1] = job_key(item[7][k]) end
    redis.call('DEL', unpack(records))
  end
  work = work + #item[7] / 4
  redis.call('SET', outcomes_key(id), ARGV[item[3]])
  redis.call('HDEL', job_key(id), 'pq_kept', 'pq_failures')
  redis.call('HSET', job_key(id), 'pq_left', item[4] + item[5], 'pq_unfinished', 0, 'pq_next', item[6],
    'pq_has_gaps', 1, 'pq_first_attempt', f.last + 1)
  uncount(f.sub, 'failed', item[4])
  uncount(f.sub, 'canceled', item[5])
  note(id, f.name, f.sub)
  if not f.parents then
    local parents, many = parents_of(f.after, f.reason == 'dependency')
    if many or #parents > 0 then return wait_for(id, f.class, parents, many) end
    return queue_up(id, f.class)
  end
  redis.call('HSET', job_key(id), 'status', 'deferred', 'origin', queue_of(f.class))
  redis.call('ZADD', registry('deferred', queue_of(f.class)), ADOPTED + now, id)
  look_again(id, f.after, 0, f.count - 1)
  return 'deferred'
end

-- The element's own record, if it was kept, makes room; returns the number of its last execution.
local function drop_record(id, array, f)
  local v = redis.call('HMGET', job_key(id), 'status', 'pq_exec')
  if not v[1] then return f.last end
  local execution = number_in('pq_exec', v[2], f.last)
  redis.call('DEL', job_key(id))
  redis.call('ZREM', registry('failed', queue_of(f.class)), id)
  redis.call('HINCRBY', job_key(array), 'pq_kept', -1)
  return execution
end

-- Did an element that this one waits for end, and not finish? It would be omitted at once, again.
local function failed_above(f, at)
  for parent in string.gmatch(f.parents and f.after or '', '%S+') do
    if redis.call('BITFIELD', outcomes_key(parent), 'GET', 'u2', at)[1] > 1 then return true end
  end
end

-- Has what the whole array waits for ended? An element that failed had begun: then it had.
local function ready_to_run(f, outcome)
  if f.parents then return true end
  local open, many = parents_of(f.after, f.reason == 'dependency')
  return many and outcome == 2 or not many and #open == 0
end

local function requeue_element(id, array, index)
  local f = array and read_array(array)
  if not f then return 'unknown' end
  local position = position_of(index, f.array)
  if not position then return 'unknown' end
  local at = '#' .. string.format('%d', position)
  local outcome = redis.call('BITFIELD', outcomes_key(array), 'GET', 'u2', at)[1]
  if outcome == 1 then return 'finished' end
  if outcome == 0 then
    local status = redis.call('HGET', job_key(id), 'status') or 'queued'
    return STATUSES[status] and status or 'damaged'
  end
  local why = hindrance(f) or f.ended and not ready_to_run(f, outcome) and 'dependency' or failed_above(f, at) and 'dependency'
  if why then return why end
  local execution = drop_record(id, array, f)
  redis.call('BITFIELD', outcomes_key(array), 'SET', 'u2', at, 0)
  redis.call('HINCRBY', job_key(array), 'pq_left', 1)
  redis.call('HINCRBY', job_key(array), 'pq_unfinished', -1)
  if outcome == 2 then redis.call('HINCRBY', job_key(array), 'pq_failures', -1) end
  if f.ended then
    reopen(array, f)
    redis.call('HSET', job_key(array), 'status', 'started', 'origin', queue_of(f.class), 'started_at', now_iso, 'pq_next', f.count)
    redis.call('ZADD', registry('wip', queue_of(f.class)), 'inf', array .. ':0')
  end
  uncount(f.sub, outcome == 2 and 'failed' or 'canceled', 1)
  note(id, f.name, f.sub, array, redis.call('HEXISTS', job_key(array), 'pq_bundle') == 0 and tonumber(index) or nil)
  if f.parents then
    redis.call('HDEL', elementwise_key(array) .. ':seen', 'w' .. string.format('%d', position))
    look_again(array, f.after, position, position)
  elseif f.ended or position < f.next then
    f.submission = f.sub
    f.created = f.created_at
    mark_recorded(array, position)
    make_element(array, position, f, {'status', 'queued', 'pq_exec', execution, 'pq_retries', f.retries or '0'})
    queue_up(id, f.class)
  end
  return 'queued'
end

-- A job of RQ's producers: route_rq.lua does the rest, as after RQ's own requeue.
local function requeue_rq_job(id, status, class)
  if not bad(status) then return status end
  if status == 'canceled' and redis.call('HEXISTS', job_key(id), 'pq_reason') == 0 then return 'ending' end
  redis.call('ZREM', registry('failed', queue_of(class)), id)
  redis.call('ZREM', registry('canceled', queue_of(class)), id)
  to_rq_list(id, queue_of(class), false, now_iso)
  return 'queued'
end

local function requeue(item)
  local id = item[1]
  local v = redis.call('HMGET', job_key(id), 'status', 'pq_class', 'pq_sub', 'pq_name', 'pq_after', 'pq_array', 'pq_reason',
    'pq_array_of')
  if v[1] and not STATUSES[v[1]] then damaged('status', v[1]) end
  -- What a submit has staged and not committed yet nobody can know.
  if (v[1] == 'queued' and not v[7] or v[1] == 'deferred') and (v[3] or '') ~= '' and redis.call('TTL', job_key(id)) >= 0 then return 'unknown' end
  if not v[1] or v[8] then return requeue_element(id, string.match(id, '^(.-)_(%d+)$')) end
  if v[6] then return item[2] and requeue_array(id, item) or v[1] end
  if v[1] == 'queued' and lease_of_task(id) then return 'started' end
  if not v[2] then return v[1] end -- only RQ's own producers know it
  if v[3] == '' then return requeue_rq_job(id, v[1], v[2]) end
  return requeue_task(id, v)
end

local function answer_of(item)
  local done, word = guarded(nil, item[1], requeue, item)
  return done and word or 'damaged'
end

local answer = {}
for number, item in ipairs(cmsgpack.unpack(ARGV[4])) do
  if work >= WORK_MAX then break end
  work = work + WORK_OF_TASK
  answer[number] = answer_of(item)
end
flush_ready()
flush_lines()
wake()
return answer
