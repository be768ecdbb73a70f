-- cancel: the user wants these tasks not to run (any more). Events cancel, cancel_joining.
--
-- ARGV: 1 queue id, 2 now (unix s), 3 now (ISO), 4 ttl of canceled records (s), 5 reason for which what waits is canceled (what
--       has begun goes on; of an array the elements that wait are canceled), or '' (all of them), 6... ids.
-- Returns for each id, or for the first ones only when they are much work: 'canceled' (it was waiting), 'stopping' (it runs,
-- or elements of it do: their workers have the message to stop it), its status when it has ended (that of a damaged
-- record is 'failed' from now on), 'started' (only what waits is canceled: its worker ends it if it has not begun), or 'unknown'. Ids stay in the middle of their lists: claim drops them.
-- RQ's own job.cancel() sets the status and sends no message: a task that it has met and we do not know of yet (no reason, no
-- pq_cancel) is treated like any other; the reconciler calls for that.
if not queue_id_ok() then return queue_id_error() end
local now, now_iso, ttl = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local only_waiting, changed = ARGV[5] ~= '' and ARGV[5], false
local why = only_waiting or 'canceled'
local WORK_MAX, work = 250, 0 -- of one call: a task, or some thousand elements of an array, count one

local function send_stop(id, node, execution)
  if not only_waiting then redis.call('HSET', job_key(id), 'pq_cancel', 'canceled') end
  stop_on(node, id, execution, only_waiting)
end

-- An array: elements that never had a record end here; those handed out are stopped, one by one where they have a record.
local function cancel_array(id, v)
  class_in(v[5])
  local count, queue = count_in(v[4]), queue_of(v[5])
  work = work + count / 4000
  if only_waiting then
    end_waiting(id, why, now, now_iso, ttl)
    return 'canceled'
  end
  if not v[7] then number_in('pq_next', v[6]) end
  redis.call('HSET', job_key(id), 'pq_cancel', 'canceled')
  local leased_too = stop_leased(id, false)
  local running = records_running(id, queue)
  work = work + #running
  for _, member in ipairs(running) do
    local element, execution = string.match(member, '^(.*):(%d+)$')
    local node = redis.pcall('HGET', job_key(element), 'pq_node')
    if type(node) == 'string' then send_stop(element, node, execution) end
  end
  end_waiting(id, nil, now, now_iso, ttl)
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
  local lease = only_waiting and select(3, leased(id))
  if lease then
    stop_on(lease.address, id, lease.execution, only_waiting)
    return 'started'
  end
  if record_leased(id) then return nil end -- it runs, or is about to: as one that has a record
  if redis.call('TTL', job_key(array)) >= 0 then return 'unknown' end -- staged
  -- Somebody deleted its record. If it ran by then its end is still to come, and counts it.
  if #in_wip(queue_of(v[3]), id .. ':') > 0 then return 'stopping' end
  redis.call('HSET', job_key(array), 'pq_has_gaps', 1)
  end_elements(array, v[1], position, position, now, now_iso, ttl)
  changed = true
  return 'canceled'
end

local function cancel(id, is_recorded)
  own_task(id)
  local v = redis.call('HMGET', job_key(id), 'status', 'pq_exec', 'pq_node', 'pq_array', 'pq_class', 'pq_next', 'pq_parents',
    'pq_sub', 'origin', 'pq_cancel', 'pq_reason', 'pq_running', 'pq_join', 'pq_joining')
  local status = v[1]
  if not status and v[5] then damaged('status') end
  if not status then return cancel_element(id) or not is_recorded and cancel(id, true) or 'unknown' end
  local waiting = status == 'queued' or status == 'deferred' or status == 'scheduled' or status == 'rate_limited'
    or status == 'ready_to_enqueue'
  -- What a submit has staged and not committed yet nobody can know.
  if waiting and (v[8] or '') ~= '' and redis.call('TTL', job_key(id)) >= 0 then return 'unknown' end
  if not STATUSES[status] then damaged('status', status) end
  if not waiting and status ~= 'started' and status ~= 'canceled' then return status end
  local joining = v[14] and not v[11]
  if joining and only_waiting then return 'started' end -- it has run
  if joining then
    joins.cancel(id, queue_of(class_in(v[5])), now)
    changed, work = true, work + 1
    return 'stopping'
  end
  -- One that had finished before RQ's cancel met it has no reason, and a TTL.
  if status == 'canceled' and (v[10] or v[11] or (v[8] or '') ~= '' and redis.call('TTL', job_key(id)) >= 0) then return status end
  if only_waiting and not waiting and not v[4] then
    if v[3] and not v[12] then send_stop(id, v[3], v[2]) end
    return status
  end
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
    if v[13] then joins.look_later(id) end
    return 'stopping'
  end
  return end_unrun(id, why, now, now_iso, ttl, only_waiting) or 'canceled'
end

local answer = {}
for i = 6, #ARGV do
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
