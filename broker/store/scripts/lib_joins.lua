-- Behind lib_rq.lua in the library: tasks that join, which end when their process and all of their children have ended.
--
-- A child is a task or array that was submitted from within one that joins. It is waited for as any parent is, by an entry in
-- pilotq:dependents:<child>: '<task>#<life>:j'. A requeue begins another life of the task, which has other children.
-- Between the end of its process and its own a task is *joining*: deferred, with the outcome of its process in pq_joining.

do

-- A record that has ended says why, or has finished.
local function has_ended(status, reason) return reason or status == 'finished' end

-- '<task>#<life>' of a task that joins and has not ended, nil of any other: its submissions keep that.
function joins.name_of(id)
  local v = redis.pcall('HMGET', job_key(id), 'pq_join', 'status', 'pq_reason')
  return v[1] and not has_ended(v[2], v[3]) and id .. '#' .. v[1] or nil
end

-- The task of such a name, and whether that life of it has not ended.
local function parent_named(name)
  local id, life = string.match(name or '', '^(.*)#(%d+)$')
  if not id then return end
  local v = redis.pcall('HMGET', job_key(id), 'pq_join', 'status', 'pq_reason', 'pq_cancel')
  return id, v[1] == life and not has_ended(v[2], v[3]), v[4]
end

-- It is to be looked at: it may end, or its children are to be canceled.
function joins.look_later(id) redis.call('RPUSH', 'pilotq:release', 'j:' .. id) end

local function wait_for_child(id, name)
  redis.call('RPUSH', dependents_key(id), name .. ':j')
  track_parent(id)
end

-- So many children more are being submitted.
function joins.expect(name, number)
  local id = string.match(name, '^(.*)#')
  redis.call('HINCRBY', job_key(id), 'pq_children', number)
  redis.call('HINCRBY', job_key(id), 'pq_open_children', number)
end

-- One of these. `is_there`: it has a record; without one it has ended.
function joins.adopt(name, id, is_there)
  local parent, open, canceled = parent_named(name)
  wait_for_child(id, name)
  if open then redis.call('RPUSH', children_key(parent), id) end
  if open and canceled then joins.look_later(parent) end
  if is_there then
    redis.call('HSET', job_key(id), 'pq_has_dependents', '1')
  else
    redis.call('RPUSH', 'pilotq:release', 'o:' .. id)
  end
end

-- A record that has ended is about to run again. As a child it is waited for again; as a task that joins it begins anew.
function joins.requeue(id)
  local v = redis.call('HMGET', job_key(id), 'pq_join', 'pq_sub')
  if v[1] then
    redis.call('HINCRBY', job_key(id), 'pq_join', 1)
    redis.call('HDEL', job_key(id), 'pq_joining', 'pq_process_ended', 'pq_children', 'pq_open_children', 'pq_bad_children', 'pq_bad_child')
    redis.call('DEL', children_key(id), 'rq:results:' .. id)
  end
  local name = redis.call('HGET', submit_key(v[2] or ''), 'child_of')
  local parent, open, canceled = parent_named(name)
  -- With an entry of that name its last end has not been told yet, and the next one is.
  if not open or canceled or redis.call('LPOS', dependents_key(id), name .. ':j') then return end
  wait_for_child(id, name)
  redis.call('HINCRBY', job_key(parent), 'pq_open_children', 1)
  redis.call('HINCRBY', job_key(parent), 'pq_bad_children', -1)
  if redis.call('HGET', job_key(parent), 'pq_bad_child') == id then redis.call('HDEL', job_key(parent), 'pq_bad_child') end
end

-- Its process has ended for good, or will never run (again): the task ends so unless it has children. Returns whether it has.
-- Those go on where only what waits is canceled (`goes_on`).
function joins.begin(id, queue, status, reason, process_ended, now, goes_on)
  local v = redis.call('HMGET', job_key(id), 'pq_join', 'pq_children')
  if not v[1] or not v[2] then return false end
  redis.call('HSET', job_key(id), 'status', 'deferred', 'origin', queue, 'pq_joining', status .. ':' .. reason, 'pq_process_ended', process_ended)
  redis.call('HDEL', job_key(id), 'worker_name', 'pq_slot', 'pq_running', 'pq_out', 'pq_err', 'pq_shown')
  if status == 'canceled' and not goes_on then redis.call('HSET', job_key(id), 'pq_cancel', 'canceled') end
  redis.call('ZADD', registry('deferred', queue), ADOPTED + now, id)
  joins.look_later(id)
  return true
end

-- The user does not want a task that has children, and does not run: they are canceled, and it ends when they have.
function joins.cancel(id, queue, now)
  redis.call('HSET', job_key(id), 'status', 'deferred', 'origin', queue, 'pq_cancel', 'canceled')
  redis.call('ZADD', registry('deferred', queue), ADOPTED + now, id)
  joins.look_later(id)
end

-- How a joining task ends: status, reason, and a sentence about children.
local function end_of_join(v)
  local status, reason = string.match(v[1], '^(%a+):(.*)$')
  local bad = tonumber(v[2] or '') or 0
  if v[5] and status ~= 'canceled' and (status ~= 'finished' or bad > 0) then return 'canceled', 'canceled', '' end
  if status ~= 'finished' or bad <= 0 then return status, reason, '' end
  local first = v[3] and ', the first of them ' .. v[3] or ''
  if bad == 1 and v[3] then return 'failed', 'children', 'task ' .. v[3] .. ' did not finish' end
  return 'failed', 'children', string.format('%d of %s children did not finish', bad, v[4] or '?') .. first
end

-- What an executor is told of the value of a call: it stands in the task's results until then.
local function text_of_result(id)
  local entry = redis.call('XREVRANGE', 'rq:results:' .. id, '+', '-', 'COUNT', 1)[1]
  local f = {}
  for k = 1, entry and #entry[2] or 0, 2 do f[entry[2][k]] = entry[2][k + 1] end
  if f.exc_string then return f.exc_string .. '\n' .. (f.pq_exception or '') end
  return f.return_value or f.pq_file or ''
end

-- A joining task ends when no child is open.
function joins.finish(id, now, now_iso, ttl_finished, ttl_failed)
  local v = redis.call('HMGET', job_key(id), 'pq_joining', 'pq_bad_children', 'pq_bad_child', 'pq_children', 'pq_cancel',
    'pq_open_children', 'pq_class', 'pq_sub', 'pq_has_dependents', 'pq_name', 'description', 'enqueued_at', 'pq_exit', 'pq_cpus',
    'pq_node', 'pq_process_ended', 'pq_reason')
  if not v[1] or v[17] or number_in('pq_open_children', v[6], 0) > 0 then return end
  local queue, submission = queue_of(class_in(v[7])), v[8]
  local status, reason, message = end_of_join(v)
  local ttl = tonumber(status == 'finished' and ttl_finished or ttl_failed)
  local kind = status == 'stopped' and 'failed' or status
  count_end(submission, status, 1)
  if reason == 'children' then add_result(id, '2', message, '', ttl) end
  -- What was canceled has no value, though its process has returned one.
  if status == 'canceled' then redis.call('DEL', 'rq:results:' .. id) else redis.call('ZREM', registry('canceled', queue), id) end
  local text = executor_of(submission) and text_of_result(id) or ''
  redis.call('HDEL', job_key(id), 'pq_joining')
  redis.call('HSET', job_key(id), 'status', status, 'origin', queue, 'pq_reason', reason, 'ended_at', now_iso)
  for _, key in ipairs({job_key(id), children_key(id), 'rq:results:' .. id}) do redis.call('EXPIRE', key, ttl) end
  redis.call('ZREM', registry('deferred', queue), id)
  redis.call('ZADD', registry(kind, queue), status == 'canceled' and now or now + ttl, id)
  local line = {id = id, name = printable(v[10]), submission = printable(submission), command = printable(v[11]), message = message,
    node = string.match(v[15] or '', '^(.*):'), cpus = v[14], joining = seconds_of(v[16]),
    exit_code = tonumber(v[13] or '') or v[14] and string.find(v[1], '^finished') and 0 or nil}
  journal(cmsgpack.pack(line), {status = status, reason = reason, final = true, ended = tonumber(now),
    queued = seconds_of(v[12]) or tonumber(now)})
  request_release(id, v[9], status)
  notify_executor(submission, id, status, reason, text)
end

-- A child has ended in this way (see END_LETTERS).
function joins.count_end(id, life, child, kind, now, now_iso, ttl_finished, ttl_failed)
  local v = redis.call('HMGET', job_key(id), 'pq_join', 'pq_open_children', 'status', 'pq_reason')
  if not v[1] then redis.call('DEL', children_key(id)) end -- somebody has deleted the task
  if v[1] ~= life or has_ended(v[3], v[4]) then return end
  number_in('pq_open_children', v[2])
  redis.call('HINCRBY', job_key(id), 'pq_open_children', -1)
  if kind ~= 'k' then
    redis.call('HINCRBY', job_key(id), 'pq_bad_children', 1)
    redis.call('HSETNX', job_key(id), 'pq_bad_child', child)
  end
  joins.finish(id, now, now_iso, ttl_finished, ttl_failed)
end

-- A task that is to be looked at. Returns its children, at most so many, that are to be canceled.
function joins.look(id, limit, now, now_iso, ttl_finished, ttl_failed)
  joins.finish(id, now, now_iso, ttl_finished, ttl_failed)
  local v = redis.call('HMGET', job_key(id), 'pq_cancel', 'status', 'pq_reason')
  if not v[1] or has_ended(v[2], v[3]) then return {} end
  return redis.call('LRANGE', children_key(id), 0, limit - 1)
end

end
