-- end: executions have ended. Events end_finished, end_failed, end_retried, end_free, end_stopped, end_canceled, lost,
-- crash_limit.
--
-- Idempotent: a report is judged by its execution number; of a task that has ended with that number it is answered
-- 'ok' again, and nothing is written. The mail to the dispatcher is sent once for each number of call.
-- ARGV: 1 epoch, 2 node:incarnation ('' = the dispatcher, for a lost node), 3 number of the call, 4 mail (packed, may be ''),
--       5 now (unix s), 6 ttl of finished, 7 ttl of failed (s), 8 crash limit,
--       9 msgpack [[id, execution, wish, reason, ended ISO, exit, started ISO, allocation, array, position,
--         class, submission, retries left], ...]; an empty class: all three are read from the record,
--       10... for each report two: its journal line (msgpack map), the text RQ shows of a failure ('' = none).
-- wish: finished, failed, stopped, canceled, lost (requeued, counts against the crash limit), free (requeued).
-- Returns for each report 'ok', 'retry' (counted, and queued again) or 'stale' (a newer execution stands, or the record
-- is gone).
if not epoch_ok() then return epoch_error() end
local node, call, mail, now = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local ttl_finished, ttl_failed, crash_limit = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local KEPT_ELEMENTS = 10000 -- records of failed elements an array keeps
local verdicts, done, wip, front, arrays, each = {}, {}, {}, {}, {}, {}
local requeued, last_ended = false, ''

local function add(map, key, ...)
  local items = map[key]
  if not items then items = {}; map[key] = items end
  for _, item in ipairs({...}) do items[#items + 1] = item end
end

-- Is the array's record there, and does anything wait for it element by element? Asked once a call.
local function known(array)
  if not each[array] then
    each[array] = redis.call('HMGET', job_key(array), 'pq_array', 'pq_each')
  end
  return each[array]
end

local function end_element(f, id, status)
  local array = f.array
  if not known(array)[1] then -- somebody deleted the array
    redis.call('DEL', job_key(id), bits_key(array))
    return
  end
  local outcome = status == 'finished' and 1 or (status == 'canceled' and 3 or 2)
  redis.call('BITFIELD', bits_key(array), 'SET', 'u2', '#' .. f.position, outcome)
  local state = arrays[array]
  if not state then state = {0, 0}; arrays[array] = state end
  state[1] = state[1] + 1
  if outcome ~= 1 then state[2] = state[2] + 1 end
  if outcome ~= 2 or redis.call('HINCRBY', job_key(array), 'pq_kept', 1) > KEPT_ELEMENTS then
    redis.call('DEL', job_key(id))
    status = nil
  end
  if known(array)[2] then redis.call('RPUSH', 'pilotq:release', string.format('e:%s:%d:%d', array, f.position, f.position)) end
  return status
end

local function final(r, f, id, status, reason, text)
  local queue, ttl = f.queue, status == 'finished' and ttl_finished or ttl_failed
  count_end(f.submission, status, 1)
  local kept = status
  if f.array then kept = end_element(f, id, status) end
  if kept then
    redis.call('HSET', job_key(id), 'status', status, 'ended_at', r[5], 'pq_exit', r[6], 'started_at', r[7],
      'pq_cpus', r[8], 'pq_reason', reason)
    redis.call('EXPIRE', job_key(id), ttl)
    local kind = status == 'stopped' and 'failed' or status
    add(done, registry(kind, queue), status == 'canceled' and now or now + ttl, id)
    if text ~= '' and (status == 'failed' or status == 'stopped') then
      redis.call('XADD', 'rq:results:' .. id, 'MAXLEN', '10', '*', 'type', '2', 'exc_string', text, 'worker_name', string.match(node, '^(.*):') or '')
      redis.call('EXPIRE', 'rq:results:' .. id, ttl)
    end
  end
  release_dependents(id, f.kids, status)
end

local function requeue(id, f, command)
  redis.call('HSET', job_key(id), 'status', 'queued', 'origin', f.class)
  redis.call('HDEL', job_key(id), 'worker_name', 'pq_node', 'pq_lane', 'pq_running', 'pq_out', 'pq_err')
  if command == 'LPUSH' then add(front, f.class, id) else redis.call('RPUSH', list_key(f.class), id) end
  redis.call('SADD', 'rq:queues', list_key(f.class))
  requeued = true
end

-- What becomes of an execution that had this wish: status, reason, and whether the task is queued again.
local function judge(wish, reason, f, id)
  if f.status == 'canceled' then return 'canceled', 'canceled', false end
  if wish ~= 'finished' and f.cancel then return 'canceled', 'canceled', false end
  if wish == 'failed' and f.retries > 0 then
    redis.call('HSET', job_key(id), 'pq_retries', f.retries - 1)
    requeue(id, f, 'RPUSH')
    return 'failed', reason, true
  elseif wish == 'free' then
    requeue(id, f, 'LPUSH')
    return 'failed', reason, true
  elseif wish == 'lost' then
    -- A worker says it of executions that had begun. Of a dead node we only know who had a lane of its own: a task
    -- that was handed ahead may not have begun, and is not charged.
    local begun = node ~= '' or redis.call('HEXISTS', job_key(id), 'pq_lane') == 1
    local crashes = begun and redis.call('HINCRBY', job_key(id), 'pq_crashes', 1) or 0
    if crashes >= crash_limit then return 'failed', 'crash limit', false end
    requeue(id, f, 'LPUSH')
    return 'failed', reason, true
  end
  return wish, reason, false
end

-- There is no record: an element that finished, or a task whose record expired, or was deleted while it ran. That
-- counts as canceled, once: its place in wip tells.
local function vanished(r, id, execution, line)
  local array, member = r[9] ~= '' and r[9], id .. ':' .. execution
  -- An element's record is dropped at its end: then its two bits tell whether this report was counted.
  if array and redis.call('BITFIELD', bits_key(array), 'GET', 'u2', '#' .. r[10])[1] ~= 0 then return 'ok' end
  if r[11] == '' or redis.call('ZREM', registry('wip', queue_of(r[11])), member) == 0 then return 'stale' end
  last_ended = r[5]
  count_end(r[12], 'canceled', 1)
  if array then end_element({array = array, position = r[10]}, id, 'canceled') end
  journal(line, packed_verdict('canceled', 'canceled', true))
  return 'stale'
end

local function report(r, line, text)
  local id, execution = r[1], tostring(r[2])
  local v = redis.call('HMGET', job_key(id), 'status', 'pq_exec', 'pq_cancel', 'pq_kids')
  if not v[1] then return vanished(r, id, execution, line) end
  if v[2] ~= execution then return 'stale' end
  local again = v[1] == 'finished' or v[1] == 'failed' or v[1] == 'stopped'
  local f = {status = v[1], cancel = v[3], kids = v[4], array = r[9] ~= '' and r[9], position = r[10], class = r[11],
    submission = r[12], retries = r[13]}
  if f.class == '' then
    local more = redis.call('HMGET', job_key(id), 'pq_class', 'pq_sub', 'pq_retries', 'pq_array_of', 'pq_pos')
    f.class, f.submission, f.retries, f.array, f.position = more[1], more[2], tonumber(more[3] or 0), more[4], more[5]
  end
  f.queue = queue_of(f.class)
  if v[1] == 'canceled' then again = redis.call('ZREM', registry('wip', f.queue), id .. ':' .. execution) == 0 end
  if again then return 'ok' end
  if v[1] ~= 'started' and v[1] ~= 'canceled' then return v[1] == 'queued' and 'retry' or 'stale' end
  add(wip, f.queue, id .. ':' .. execution)
  last_ended = r[5]
  local status, reason, retried = judge(r[3], r[4], f, id)
  if not retried then final(r, f, id, status, reason, text) end
  journal(line, packed_verdict(status, reason, not retried))
  return retried and 'retry' or 'ok'
end

local finished, failed = 0, 0
for number, r in ipairs(cmsgpack.unpack(ARGV[9])) do
  verdicts[number] = report(r, ARGV[8 + 2 * number], ARGV[9 + 2 * number])
  if verdicts[number] == 'ok' and r[3] == 'finished' then finished = finished + 1 end
  if verdicts[number] == 'ok' and r[3] == 'failed' then failed = failed + 1 end
end
for queue, members in pairs(wip) do push('ZREM', registry('wip', queue), members) end
for key, members in pairs(done) do push('ZADD', key, members) end
for class, ids in pairs(front) do
  local back = {}
  for k = #ids, 1, -1 do back[#back + 1] = ids[k] end
  push('LPUSH', list_key(class), back)
end
for array, state in pairs(arrays) do
  array_ended(array, state[1], state[2], now, last_ended, ttl_finished, ttl_failed)
end
flush_tally(ttl_failed)
flush_lines()
if node ~= '' then deliver(node, call, mail, finished, failed) end
if requeued or redis.call('EXISTS', 'pilotq:release') == 1 then ring() end
return verdicts
