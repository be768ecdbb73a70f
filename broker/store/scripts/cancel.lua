-- cancel: the user wants these tasks not to run (any more). Event cancel.
--
-- ARGV: 1 queue id, 2 now (unix s), 3 now (ISO), 4 ttl of canceled records (s), 5... ids.
-- Returns for each id, or for the first ones only when they are much work: 'canceled' (it was waiting), 'stopping' (it runs,
-- or elements of it do: their workers have the message to stop it), its status when it has ended (that of a damaged record is
-- 'failed' from now on), or 'unknown'. Ids stay in the middle of their lists: claim drops them.
-- RQ's own job.cancel() sets the status and sends no message: a task that it has met and we do not know of yet (no reason, no
-- pq_cancel) is treated like any other; the reconciler calls for that.
if not queue_id_ok() then return queue_id_error() end
local now, now_iso, ttl = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local changed = false
local WORK_MAX, work = 250, 0 -- of one call: a task, or some thousand elements of an array, count one

local function send_stop(id, node, execution)
  redis.call('HSET', job_key(id), 'pq_cancel', 'canceled')
  send(node, 1, string.char(148) .. cmsgpack.pack('stop', id, tonumber(execution), 'canceled'))
end

-- Nodes that leases of an array name stop what they have of it. Returns whether there are any.
local function stop_leased(array)
  local nodes = {}
  for _, member in ipairs(redis.call('ZRANGE', leases_key(array), 0, -1)) do
    local node = string.match(member, '^%d+ %d+ %d+ %d+ %S+ (.+)$')
    if node and not nodes[node] then
      nodes[node] = true
      send(node, 1, string.char(148) .. cmsgpack.pack('stop', array, 0, 'canceled'))
    end
  end
  return next(nodes) ~= nil
end

-- An array: elements that never had a record end here; those handed out are stopped, one by
-- one where they have a record; what went back to its list,
-- or waits element by element, is found by release_dependents.lua in slices.
local function cancel_array(id, v)
  class_in(v[5])
  local count, queue = count_in(v[4]), queue_of(v[5])
  local handed = v[7] and count or number_in('pq_next', v[6])
  redis.call('HSET', job_key(id), 'pq_cancel', 'canceled', 'pq_next', count)
  local leased_too = stop_leased(id)
  local running = redis.call('ZRANGEBYLEX', registry('wip', queue), '[' .. id .. '_', '(' .. id .. '`')
  work = work + #running + count / 4000
  for _, member in ipairs(running) do
    local element, execution = string.match(member, '^(.*):(%d+)$')
    local node = redis.pcall('HGET', job_key(element), 'pq_node')
    if type(node) == 'string' then send_stop(element, node, execution) end
  end
  redis.call('ZREM', registry('deferred', queue), id)
  if handed > 0 and v[1] ~= 'started' then
    if v[1] ~= 'canceled' then redis.call('HSET', job_key(id), 'status', 'started', 'origin', queue, 'started_at', now_iso) end
    redis.call('ZADD', registry('wip', queue), 'inf', id .. ':0')
  end
  if handed > 0 then redis.call('RPUSH', 'pilotq:release', string.format('c:%s:0:%d', id, handed - 1)) end
  if handed < count then end_elements(id, v[8], handed, count - 1, now, now_iso, ttl) end
  return (leased_too or #running > 0) and 'stopping' or 'canceled'
end

-- An element without a record: one that waits to be handed out, or for another array's element, or whose record somebody
-- deleted, is marked as ended, and claim and release pass it over.
local function cancel_element(id)
  local array, index = string.match(id, '^(.-)_(%d+)$')
  local text = array and text_of(array)
  if not text then return 'unknown' end
  local v = redis.call('HMGET', job_key(array), 'pq_sub', 'pq_cancel', 'pq_class')
  local position = count_in(text) and position_of(index, text)
  if not position then return 'unknown' end
  local outcome = redis.call('BITFIELD', outcomes_key(array), 'GET', 'u2', '#' .. string.format('%d', position))[1]
  if outcome ~= 0 then return ({'finished', 'failed', 'canceled'})[outcome] end
  if v[2] then return 'stopping' end
  if record_leased(id) then return nil end -- it runs, or is about to: as one that has a record
  if redis.call('TTL', job_key(array)) >= 0 then return 'unknown' end -- staged
  -- Somebody deleted its record. If it ran by then its end is still to come, and counts it.
  if redis.call('ZLEXCOUNT', registry('wip', queue_of(v[3])), '[' .. id .. ':', '(' .. id .. ';') > 0 then return 'stopping' end
  redis.call('HSET', job_key(array), 'pq_has_gaps', 1)
  end_elements(array, v[1], position, position, now, now_iso, ttl)
  changed = true
  return 'canceled'
end

local function cancel(id, is_recorded)
  local v = redis.call('HMGET', job_key(id), 'status', 'pq_exec', 'pq_node', 'pq_array', 'pq_class', 'pq_next', 'pq_parents',
    'pq_sub', 'origin', 'pq_cancel', 'pq_reason')
  local status = v[1]
  if not status and v[5] then damaged('status') end
  if not status then return cancel_element(id) or not is_recorded and cancel(id, true) or 'unknown' end
  local waiting = status == 'queued' or status == 'deferred' or status == 'scheduled' or status == 'rate_limited'
    or status == 'ready_to_enqueue'
  -- What a submit has staged and not committed yet nobody can know.
  if waiting and (v[8] or '') ~= '' and redis.call('TTL', job_key(id)) >= 0 then return 'unknown' end
  if not STATUSES[status] then damaged('status', status) end
  if not waiting and status ~= 'started' and status ~= 'canceled' then return status end
  if status == 'canceled' and (v[10] or v[11]) then return status end
  changed = true
  work = work + 1
  if v[4] then return v[10] and 'stopping' or cancel_array(id, v) end
  local member = id .. ':' .. (v[2] or '')
  local wip = registry('wip', queue_of(v[5] or v[9]))
  if status == 'started' or status == 'canceled' and (v[3] or redis.call('ZSCORE', wip, member)) then
    -- RQ's cancel of what it sees running takes it out of there: its end is counted by that.
    if not v[3] then damaged('pq_node') end
    number_in('pq_exec', v[2])
    redis.call('ZADD', wip, 'inf', member)
    send_stop(id, v[3], v[2])
    return 'stopping'
  end
  end_unrun(id, 'canceled', now, now_iso, ttl)
  return 'canceled'
end

local answer = {}
for i = 5, #ARGV do
  if work >= WORK_MAX then break end
  local done, status = guarded({now, now_iso, ttl}, ARGV[i], cancel, ARGV[i])
  if not done then
    status = redis.pcall('HGET', job_key(ARGV[i]), 'status')
    changed = true
  end
  answer[#answer + 1] = type(status) == 'string' and status or 'unknown'
end
flush_tally(ttl)
flush_lines()
if changed then wake() end
return answer
