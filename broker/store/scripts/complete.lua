-- complete: executions have ended. Events end_finished, end_failed, end_retried, end_later, end_requeued, end_stopped,
-- end_canceled, end_joining, lost, crash_limit.
--
-- Idempotent: a report is judged by its execution number; of a task that has ended with that number it is answered
-- 'ok' again, and nothing is written. The message to the dispatcher is sent once for each number of call.
-- ARGV: 1 queue id, 2 node:incarnation ('' = the dispatcher, for a lost node), 3 number of the call, 4 message (packed, may be ''),
--       5 now (unix s), 6 ttl of finished, 7 ttl of failed (s), 8 crash limit,
--       9 msgpack [[id, execution, outcome, reason, ended ISO, exit, started ISO, allocation, array, position,
--         class, submission, retries left, seconds until a retry, and of one that asks for more when it is tried again: the
--         class of that, and the number of the argument that has its spec, 0 = as it is], ...]; an empty class: all three are
--         read from the record,
--       10... for each report two: its journal line (msgpack map), the text RQ shows of a failure ('' = none); then msgpack
--         [[array, execution, submission, ended ISO (of the last), first position, number], ...]: runs of elements that a lease
--         of this node holds, and that have finished: nothing is to be kept of them but lines of the journal; for each run those
--         lines, packed (journal_runs.py), and a packed list of the results, which go to its executor, or stay with the bundle ('' = none);
--         then specs.
-- outcome: finished, failed, stopped, canceled, lost (requeued, counts against the crash limit), requeue (not counted),
-- suspect
-- (failed at once, like others before it on its node: requeued for another node to try, within EXCUSE_LIMIT), retried (a
-- producer's function returned RQ's Retry: the text is "<max>:<seconds>,<seconds>...", with ":front" behind it if it is to
-- go first).
-- Returns for each report 'ok', 'retry' (counted, and queued again), 'stale' (a newer execution stands, or the record is
-- gone) or 'full' (nothing was done: there is no room for its result, which is to be kept in a file); then for each run
-- 'ok', or 'apart': some of its elements have a record meanwhile, or have ended, so each must be reported by itself.
if not queue_id_ok() then return queue_id_error() end
local node, call, message, now = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local ttl_finished, ttl_failed, crash_limit = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local worker = string.match(node, '^(.*):') or ''
local RETURNED_TTL = 2592000 -- of results of a bundle that has not ended: somebody may delete that
local KEPT_ELEMENTS = 10000 -- records of failed elements an array keeps
-- The failure of a task is excused by its node no oftener than this: another node counts OTHER_NODE, the same one again 1.
local EXCUSE_LIMIT, OTHER_NODE = 12, 4
local answers, done, wip, front, arrays, elementwise = {}, {}, {}, {}, {}, {}
local requeued, last_ended = false, ''
local runs, finished_number = {}, 0

local FIELDS = {'status', 'pq_exec', 'pq_cancel', 'pq_has_dependents', 'pq_shown', 'pq_released', 'pq_join', 'pq_joining'} -- of a record

local function add(items, ...)
  for _, item in ipairs({...}) do items[#items + 1] = item end
end

local function items_of(map, key)
  local items = map[key]
  if not items then items = {}; map[key] = items end
  return items
end

-- Is the array's record there, does anything wait for it element by element, and is it a bundle? Asked once a call.
local function known(array)
  if not elementwise[array] then
    local v = redis.pcall('HMGET', job_key(array), 'pq_array', 'pq_elementwise', 'pq_bundle')
    elementwise[array] = v.err and {} or v
  end
  return elementwise[array]
end

-- Returns the status of the element's record, or nil when it has none any more.
local function end_element(f, id, status, text)
  local array = f.array
  if not known(array)[1] then -- somebody deleted the array
    redis.call('DEL', job_key(id), outcomes_key(array), returned_key(array))
    return
  end
  local outcome = status == 'finished' and 1 or (status == 'canceled' and 3 or 2)
  redis.call('BITFIELD', outcomes_key(array), 'SET', 'u2', '#' .. f.position, outcome)
  local state = arrays[array]
  if not state then state = {0, 0, 0}; arrays[array] = state end
  state[1] = state[1] + 1
  if outcome ~= 1 then state[2] = state[2] + 1 end
  if outcome == 2 then state[3] = state[3] + 1 end
  local drop = outcome == 3 or (outcome == 1 and text == '')
  if drop or (outcome == 2 and redis.call('HINCRBY', job_key(array), 'pq_kept', 1) > KEPT_ELEMENTS) then
    redis.call('DEL', job_key(id))
    status = nil
  end
  if known(array)[2] then redis.call('RPUSH', 'pilotq:release', string.format('e:%s:%d:%d', array, f.position, f.position)) end
  return status
end

-- What RQ has written of a producer's job that its end depends on; read once for each.
local function rules_of(f, id)
  f.rules = f.rules or redis.call('HMGET', job_key(id), 'retries_left', 'retry_intervals', 'enqueue_at_front_on_retry',
    'number_of_retries', 'repeats_left', 'repeat_intervals', 'result_ttl', 'failure_ttl', 'rate_limit_key')
  return f.rules
end

-- RQ's rules for the record of a producer's job.
local function final_rq_job(r, f, id, status, reason, text, kind)
  local v, queue = rules_of(f, id), f.queue
  local ttl = rq_ttl(id, status, {v[7], v[8]})
  count_end('', status, 1)
  rq_ended(id, queue, now, r[5], v[9])
  if ttl == 0 then
    redis.call('DEL', job_key(id), 'rq:results:' .. id)
  else
    redis.call('HSET', job_key(id), 'status', status, 'ended_at', r[5], 'pq_exit', r[6], 'started_at', r[7],
      'pq_cpus', r[8], 'pq_reason', reason)
    local score = ttl > 0 and now + ttl or (status == 'finished' and 'inf' or -1)
    if ttl > 0 then redis.call('EXPIRE', job_key(id), ttl) end
    add(items_of(done, registry(status == 'stopped' and 'failed' or status, queue)), status == 'canceled' and now or score, id)
    if status ~= 'canceled' then add_result(id, kind or (status == 'finished' and '1' or '2'), kind and '' or text, worker, ttl) end
  end
  request_release(id, f.dependents, status)
end

local function final(r, f, id, status, reason, text, kind)
  if f.submission == '' then return final_rq_job(r, f, id, status, reason, text, kind) end
  local queue, ttl = f.queue, status == 'finished' and ttl_finished or ttl_failed
  count_end(f.submission, status, 1)
  local kept = status
  if f.array then kept = end_element(f, id, status, text) end
  if kept then
    local fields = {'status', status, 'ended_at', r[5], 'started_at', r[7], 'pq_cpus', r[8]}
    if reason ~= '' then add(fields, 'pq_reason', reason) end
    if status ~= 'finished' or r[6] ~= '0' then add(fields, 'pq_exit', r[6]) end
    if f.is_leased then
      add(fields, 'origin', queue)
      if r[2] ~= 1 then add(fields, 'pq_exec', r[2]) end
    end
    redis.call('HSET', job_key(id), unpack(fields))
    redis.call('EXPIRE', job_key(id), ttl)
    local kind = status == 'stopped' and 'failed' or status
    add(items_of(done, registry(kind, queue)), status == 'canceled' and now or now + ttl, id)
    -- The value of an executor's call goes to that executor alone.
    local stored = text ~= '' and status ~= 'canceled' and not (status == 'finished' and executor_of(f.submission))
    if stored then add_result(id, status == 'finished' and '1' or '2', text, worker, ttl) end
  end
  request_release(id, f.dependents, status)
  notify_executor(f.submission, id, status, reason, text)
end

-- What there is of an execution that has ended in a record that stays.
local function keep_execution(r, id, status)
  local fields = {'started_at', r[7], 'pq_cpus', r[8], 'pq_exit', r[6]}
  redis.call('HSET', job_key(id), unpack(fields, 1, status == 'finished' and r[6] == '0' and 4 or 6))
end

-- The process of a task with children has ended for good. Its output is in the journal from now on, its result, that of an
-- executor's call too, with its record; the task ends with its last child.
local function join(r, f, id, status, reason, text, line)
  if f.join and f.is_leased then f.is_leased = not own_task(id) end
  if not f.join or not joins.begin(id, f.queue, status, reason, r[5], now) then return false end
  keep_execution(r, id, status)
  if text ~= '' and status ~= 'canceled' then add_result(id, status == 'finished' and '1' or '2', text, worker, 0) end
  journal(line, {status = status, reason = reason, final = false, joining = seconds_of(r[5]), released = tonumber(f.released or '')})
  return true
end

local function requeue(id, f, command)
  redis.call('HSET', job_key(id), 'status', 'queued', 'origin', f.class)
  redis.call('HDEL', job_key(id), 'worker_name', 'pq_node', 'pq_slot', 'pq_running', 'pq_out', 'pq_err', 'pq_shown')
  if f.submission == '' then begin_wait(id) end
  offer(f.class)
  if command == 'LPUSH' then add(items_of(front, f.class), id) else redis.call('RPUSH', list_key(f.class), id) end
  requeued = true
end

-- A task goes on: at once, or after so many seconds by the mover. What waits for its time gives up its slot.
local function again(id, f, seconds, front, r)
  if (seconds or 0) <= 0 then return requeue(id, f, front and 'LPUSH' or 'RPUSH') end
  redis.call('HSET', job_key(id), 'status', 'scheduled', 'origin', f.queue, 'ended_at', r[5])
  redis.call('HDEL', job_key(id), 'worker_name', 'pq_node', 'pq_slot', 'pq_running', 'pq_out', 'pq_err', 'pq_shown')
  redis.call('ZADD', registry('scheduled', f.queue), f.submission == '' and math.floor(now + seconds) or now + seconds, id)
  free_rate_slot(id, redis.call('HGET', job_key(id), 'rate_limit_key'), now, r[5])
end

-- It had too little of something: it is tried again with more, as often as it may ask for more. No retry is charged.
local function again_with_more(id, f, class, spec)
  f.class = class_in(class)
  redis.call('HSET', job_key(id), 'pq_class', class)
  if spec then redis.call('HSET', job_key(id), 'pq_spec', spec) end
  requeue(id, f, 'RPUSH')
end

-- The same as `decide` where RQ has rules of its own: Retry of an exception, a returned Retry, Repeat. Last: the type of
-- the result that RQ keeps, if it is an unusual one.
local function decide_rq_job(outcome, reason, f, id, r, text)
  local v = rules_of(f, id)
  if outcome == 'failed' and whole(v[1], 0) > 0 then
    local left, intervals = whole(v[1], 0), intervals_of(v[2])
    redis.call('HSET', job_key(id), 'retries_left', left - 1)
    again(id, f, intervals[math.max(#intervals - left, 0) + 1], v[3] == '1', r)
    return 'failed', reason, true
  elseif outcome == 'retried' then
    local most, list, front = string.match(text, '^(%d+):([%d,]*)(:?%l*)$')
    local number, intervals = whole(v[4], 0), intervals_of('[' .. (list or '') .. ']')
    if number >= whole(most, 0) then return 'failed', 'retries', false, '5' end
    redis.call('HSET', job_key(id), 'number_of_retries', number + 1)
    front = front == ':front' or v[3] == '1'
    if front then redis.call('HSET', job_key(id), 'enqueue_at_front_on_retry', 1) end -- from now on, as in RQ
    add_result(id, '4', '', worker, rq_ttl(id, 'failed'))
    again(id, f, intervals[math.min(number + 1, #intervals)], front, r)
    return 'failed', 'returned retry', true
  elseif outcome == 'finished' and whole(v[5], 0) > 0 then
    local intervals, ttl = intervals_of(v[6]), rq_ttl(id, 'finished')
    redis.call('HSET', job_key(id), 'repeats_left', whole(v[5], 0) - 1)
    if #intervals > 1 then
      redis.call('HSET', job_key(id), 'repeat_intervals', cjson.encode({unpack(intervals, 2)}))
    end
    if ttl ~= 0 then add_result(id, '1', text, worker, ttl) end
    request_release(id, f.dependents, 'finished')
    again(id, f, intervals[1], false, r)
    return 'finished', '', true
  end
  return outcome, reason, false
end

-- Is there a node that could try what has failed on this one? Asked once a call.
local elsewhere

local function another_node()
  if elsewhere == nil then
    elsewhere = false
    for _, name in ipairs(redis.call('HKEYS', 'pilotq:nodes')) do
      if name ~= worker and redis.call('HEXISTS', 'pilotq:drained', name) + redis.call('HEXISTS', 'pilotq:quarantine', name) == 0 then
        elsewhere = true
        break
      end
    end
  end
  return elsewhere
end

-- The failure of a task is not counted yet: another node is to try it first.
local function excuse(id, f)
  local weight = redis.call('HGET', job_key(id), 'pq_suspect_node') == worker and 1 or OTHER_NODE
  if not another_node() or redis.call('HINCRBY', job_key(id), 'pq_excuses', weight) > EXCUSE_LIMIT then return false end
  redis.call('HSET', job_key(id), 'pq_suspect_node', worker)
  requeue(id, f, 'LPUSH')
  return true
end

-- What becomes of an execution that had this outcome: status, reason, and whether the task is queued again.
local function decide(outcome, reason, f, id, r, text)
  if f.status == 'canceled' then return 'canceled', 'canceled', false end
  if outcome ~= 'finished' and f.cancel then return 'canceled', 'canceled', false end
  if outcome == 'suspect' then
    if excuse(id, f) then return 'failed', 'node', true end
    outcome, r[3] = 'failed', 'failed'
  end
  if f.submission == '' and (outcome == 'finished' or outcome == 'failed' or outcome == 'retried') then
    return decide_rq_job(outcome, reason, f, id, r, text)
  end
  if outcome == 'failed' and r[15] then
    again_with_more(id, f, r[15], ARGV[r[16]])
    return 'failed', reason, true
  elseif outcome == 'failed' and f.retries > 0 then
    redis.call('HSETNX', job_key(id), 'pq_budget', f.retries)
    redis.call('HSET', job_key(id), 'pq_retries', f.retries - 1)
    again(id, f, r[14], false, r)
    return 'failed', reason, true
  elseif outcome == 'requeue' then
    requeue(id, f, 'LPUSH')
    return 'failed', reason, true
  elseif outcome == 'lost' then
    -- A worker says it of executions that had begun. Of a dead node we only know who had a slot of its own: a task
    -- that was prefetched may not have begun, and is not charged.
    local begun = node ~= '' or redis.call('HEXISTS', job_key(id), 'pq_slot') == 1
    local crashes = begun and redis.call('HINCRBY', job_key(id), 'pq_crashes', 1) or 0
    if crashes >= crash_limit then return 'failed', 'crash limit', false end
    requeue(id, f, 'LPUSH')
    return 'failed', reason, true
  end
  if outcome == 'retried' then return 'failed', 'retries', false end -- only RQ's own jobs have such retries
  return outcome, reason, false
end

-- Ends go through though the memory is full, for they make room; results do not. Of our functions the worker keeps them in a
-- file then, and reports again. A producer's job has failed, as RQ's own worker fails to store its value.
local SMALL, LARGE = 256, 16384
local room

local function has_room(size)
  if not room then
    local info = redis.call('INFO', 'memory')
    local limit = tonumber(string.match(info, '\nmaxmemory:(%d+)'))
    room = limit > 0 and limit - tonumber(string.match(info, '\nused_memory:(%d+)')) or math.huge
  end
  room = room - size
  return room >= 0
end

-- The elements first..last of an array: 'ok' if all of them were held by a lease of this execution and have finished now.
local function end_run_of_lease(r, lines_of_run, values)
  local array, first, number = r[1], r[5], r[6]
  local v = known(array)
  local lease = count_of(v[1]) and lease_around(array, first)
  if not lease or lease.address ~= node or lease.execution ~= tostring(r[2]) or first + number > lease.first + lease.count then
    return 'apart'
  end
  local finished = finished_bytes(array, first, number)
  if not finished then return 'apart' end
  -- What has got a record is not the lease's any more.
  if redis.call('BITCOUNT', recorded_key(array), first, first + number - 1, 'BIT') > 0 then return 'apart' end
  if #values > SMALL and not has_room(#values) then return 'apart' end
  redis.call('SETRANGE', outcomes_key(array), math.floor(first / 4), finished)
  leave_lease(array, lease, number)
  last_ended = r[4]
  count_end(r[3], 'finished', number)
  local state = arrays[array]
  if not state then state = {0, 0, 0}; arrays[array] = state end
  state[1] = state[1] + number
  if v[2] then redis.call('RPUSH', 'pilotq:release', string.format('e:%s:%d:%d', array, first, first + number - 1)) end
  if values ~= '' and executor_of(r[3]) then
    notify_executor(r[3], '\147' .. cmsgpack.pack(array, first) .. values)
  elseif values ~= '' then
    redis.call('ZADD', returned_key(array), first, '\146' .. cmsgpack.pack(first) .. values)
    redis.call('EXPIRE', returned_key(array), RETURNED_TTL)
  end
  runs[#runs + 1] = lines_of_run
  finished_number = finished_number + number
  return 'ok'
end

-- There is no record: an element that finished, or a task whose record expired, or was deleted while it ran. That
-- counts as canceled, once: its place in wip tells. Returns nil when it is an element that has got a record now, as its lease
-- holds it.
local function vanished(r, id, execution, line, text)
  local array, member = r[9] ~= '' and r[9], id .. ':' .. execution
  -- A heartbeat may have shown it again between two steps of RQ's delete.
  if not array then
    hide_execution(id, execution, worker)
    redis.call('DEL', children_key(id))
  end
  -- An element's record is dropped at its end: then its two bits tell whether this report was counted.
  if array and redis.call('BITFIELD', outcomes_key(array), 'GET', 'u2', '#' .. r[10])[1] ~= 0 then
    if r[11] ~= '' then redis.call('ZREM', registry('wip', queue_of(r[11])), member) end
    return 'ok'
  end
  local status = (r[3] == 'finished' or r[3] == 'canceled') and r[3] or 'failed'
  local held = record_or_end(id, r[9], r[10], execution, status, now, r[5], ttl_failed)
  if held == 'record' then return end
  last_ended = r[5]
  if held then
    notify_executor(r[12], id, held, r[4], held == r[3] and text or '')
    journal(line, packed_ending(held, r[4], true))
    return 'ok'
  end
  if r[11] == '' or redis.call('ZREM', registry('wip', queue_of(r[11])), member) == 0 then return 'stale' end
  if node == '' then redis.call('SET', vanished_key(id, execution), now, 'EX', VANISHED_TTL) end
  count_end(r[12] ~= '' and r[12] or submission_of(id), 'canceled', 1)
  if array then end_element({array = array, position = r[10]}, id, 'canceled', '') end
  notify_executor(r[12], id, 'canceled', 'canceled', '')
  journal(line, packed_ending('canceled', 'canceled', true))
  return 'stale'
end

-- Status and execution of a record that has lost one of them: its place in wip tells whether this execution stands.
local function mend(id, v, execution, class)
  if class == '' then class = redis.call('HGET', job_key(id), 'pq_class') or '' end
  if not redis.call('ZSCORE', registry('wip', queue_of(class)), id .. ':' .. execution) then return v[1], v[2] end
  redis.call('HSET', job_key(id), 'pq_exec', execution, 'origin', queue_of(class))
  return STATUSES[v[1]] and v[1] or 'started', execution
end

-- A value, or the exception in the second line of a failure, that is in no file yet, and has no room.
local function no_room(outcome, text)
  if #text <= SMALL then return false end
  local pickled = outcome == 'finished' and text or outcome == 'failed' and string.match(text, '\n(.*)$') or ''
  return #pickled > SMALL and string.sub(pickled, 1, 5) ~= 'file:' and not has_room(#text)
end

-- The record of a task of a bundle that is kept says what that task was, for RQ's tools. The line is a Line of journal_runs.py, or
-- a map of its fields.
local function describe_member(id, line)
  local done, entry = pcall(cmsgpack.unpack, line)
  if not done or redis.call('EXISTS', job_key(id)) == 0 then return end
  local more = entry[14] or entry
  redis.call('HSET', job_key(id), 'description', printable(entry[12] or entry.command), 'pq_name', printable(more.name))
end

-- '<id>:<execution>' of what is reported -> whether it is in wip as a lease; read for all of a call at once.
local is_lease = {}

local function read_leases(reports)
  local members = {}
  for _, r in ipairs(reports) do
    if r[9] == '' and r[11] ~= '' and r[12] ~= '' then
      local mine = items_of(members, queue_of(r[11]))
      mine[#mine + 1] = r[1] .. ':' .. r[2]
    end
  end
  for queue, mine in pairs(members) do
    for first = 1, #mine, PIECE do
      local scores = redis.pcall('ZMSCORE', registry('wip', queue), unpack(mine, first, math.min(first + PIECE - 1, #mine)))
      for i, score in ipairs(scores.err and {} or scores) do is_lease[mine[first + i - 1]] = tonumber(score or '0') < 0 end
    end
  end
end

-- Where a lease holds a task, status and execution are those that it has by that. Returns whether it is the lease of this execution.
local function held_by_lease(r, id, execution, v)
  local last = string.format('%d', (tonumber(v[2] or '') or 0) + 1)
  if r[11] == '' then
    if not lease_of_task(id) then return false end
  else
    local known = is_lease[id .. ':' .. last]
    if known == nil then known = lease_score(queue_of(r[11]), id, last) end
    if not known then return false end
  end
  v[2] = last
  if v[1] == 'queued' then v[1] = 'started' end
  return last == execution
end

local function report(r, line, text)
  local id, execution, is_leased = r[1], tostring(r[2])
  local v = redis.pcall('HMGET', job_key(id), unpack(FIELDS))
  if r[9] == '' and (v[1] == 'queued' or v[1] == 'canceled') then is_leased = held_by_lease(r, id, execution, v) end
  if not v[1] and not v[2] and redis.pcall('HEXISTS', job_key(id), 'pq_class') ~= 1 or r[9] ~= '' and not is_record_of(r[9], id) then
    local answer = vanished(r, id, execution, line, text)
    if answer then return answer end
    v = redis.call('HMGET', job_key(id), unpack(FIELDS))
  end
  if v[1] == 'finished' and not v[2] then v[2] = '1' end
  if not string.match(v[2] or '', '^%d+$') or not STATUSES[v[1]] then v[1], v[2] = mend(id, v, execution, r[11]) end
  if v[2] ~= execution then return 'stale' end
  if is_leased and v[1] == 'canceled' then is_leased = not own_task(id) end -- by RQ, which writes the status alone
  local again = v[1] == 'finished' or v[1] == 'failed' or v[1] == 'stopped' or v[8]
  local f = {status = v[1], cancel = v[3], dependents = v[4], array = r[9] ~= '' and r[9], position = r[10], class = r[11],
    submission = r[12], retries = r[13], is_leased = is_leased, join = v[7], released = v[6]}
  if f.class == '' or f.array and f.submission == '' then
    local more = redis.call('HMGET', job_key(id), 'pq_class', 'pq_sub', 'pq_retries', 'pq_array_of', 'pq_pos')
    f.class, f.submission, f.retries = class_in(more[1]), more[2], number_in('pq_retries', more[3], 0)
    f.array, f.position = more[4], more[4] and number_in('pq_pos', more[5])
  end
  f.queue = queue_of(f.class)
  if v[1] == 'canceled' then again = redis.call('ZREM', registry('wip', f.queue), id .. ':' .. execution) == 0 end
  if again then return 'ok' end
  if v[1] == 'queued' and is_hidden(id, f.submission) and redis.call('ZSCORE', registry('wip', f.queue), id .. ':' .. execution) then
    v[1], f.status = 'started', 'started'
  end
  if v[1] ~= 'started' and v[1] ~= 'canceled' then return v[1] == 'queued' and 'retry' or 'stale' end
  if v[1] == 'started' and f.submission ~= '' and no_room(r[3], text) then return 'full' end
  if #text > LARGE and r[3] == 'finished' and f.submission == '' and no_room(r[3], text) then
    r[3], r[4], text = 'failed', 'result', ''
  end
  -- What has finished gets with its end what a record has that is with a node.
  if is_leased and (r[3] ~= 'finished' or v[1] == 'canceled') then f.is_leased = not own_task(id) end
  add(items_of(wip, f.queue), id .. ':' .. execution)
  last_ended = r[5]
  if v[5] then hide_execution(id, execution, v[5]) end
  local status, reason, retried, kind = decide(r[3], r[4], f, id, r, text)
  if not retried and join(r, f, id, status, reason, text, line) then return 'ok' end
  if not retried then final(r, f, id, status, reason, text, kind) end
  if not retried and f.array and known(f.array)[3] then describe_member(id, line) end
  journal(line, packed_ending(status, reason, not retried, v[6]))
  return retried and 'retry' or 'ok'
end

-- In a function of its own: a script has at most 200 local variables at a time.
local function report_all()
  local finished, failed = 0, 0
  local reports = cmsgpack.unpack(ARGV[9])
  local behind = 10 + 2 * #reports -- the place of the runs
  read_leases(reports)
  for number, r in ipairs(reports) do
    local _, answer = guarded({now, r[5], ttl_failed}, r[1], report, r, ARGV[8 + 2 * number], ARGV[9 + 2 * number])
    answers[number] = answer or 'stale'
    if answers[number] == 'ok' and r[3] == 'finished' then finished = finished + 1 end
    if answers[number] == 'ok' and r[3] == 'failed' then failed = failed + 1 end
  end
  for number, r in ipairs(ARGV[behind] and cmsgpack.unpack(ARGV[behind]) or {}) do
    local _, answer = guarded(nil, r[1], end_run_of_lease, r, ARGV[behind + 2 * number - 1], ARGV[behind + 2 * number])
    answers[#answers + 1] = answer or 'apart'
  end
  finished = finished + finished_number
  for queue, members in pairs(wip) do push('ZREM', registry('wip', queue), members) end
  for key, members in pairs(done) do push('ZADD', key, members) end
  for class, ids in pairs(front) do
    local back = {}
    for k = #ids, 1, -1 do back[#back + 1] = ids[k] end
    push('LPUSH', list_key(class), back)
  end
  if #runs > 0 then -- before the line of an array that ends with them
    redis.call('XADD', 'pilotq:journal', '*', 'r', string.char(220, math.floor(#runs / 256), #runs % 256) .. table.concat(runs))
  end
  for array, state in pairs(arrays) do
    guarded({now, last_ended, ttl_failed}, array, array_ended, array, state[1], state[2], now, last_ended, ttl_finished, ttl_failed,
      state[3])
  end
  flush_tally(ttl_failed)
  flush_lines()
  if node ~= '' then deliver(node, call, message, finished, failed) end
  if requeued or redis.call('EXISTS', 'pilotq:release') == 1 then wake() end
  return answers
end

return report_all()
