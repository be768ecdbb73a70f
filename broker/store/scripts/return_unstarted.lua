-- return_unstarted: handed tasks that were never launched return to the head of their lists. Events return,
-- return_canceled, return_joining.
--
-- ARGV: 1 queue id, 2 node:incarnation, 3 number of the call, 4 message (packed), 5 msgpack [[id, execution, class, array, position], ...] oldest
--       first (array and position of elements),
--       6 now (unix s), 7 now (ISO), 8 ttl of canceled records (s).
-- Returns the number of tasks that went back; ids with another execution or status are left alone. A task that was
-- canceled meanwhile ends: the message to stop it passes the task that is on its way back.
if not queue_id_ok() then return queue_id_error() end
local node, call, message, now, now_iso, ttl = ARGV[2], ARGV[3], ARGV[4], ARGV[6], ARGV[7], ARGV[8]
local lists, wip, number = {}, {}, 0

local function give_back(id, execution, class, array, position)
  local v = redis.call('HMGET', job_key(id), 'status', 'pq_exec', 'pq_class', 'pq_cancel')
  local has_changed = array == '' and own_task(id, execution, class)
  if array ~= '' and not is_record_of(array, id) then
    record_or_end(id, array, position, execution, 'canceled', now, now_iso, ttl)
    has_changed = true
  end
  if has_changed then
    v = redis.call('HMGET', job_key(id), 'status', 'pq_exec', 'pq_class', 'pq_cancel')
  end
  class = v[3]
  if v[3] and not string.match(v[2] or v[1] == 'started' and '' or '0', '^%d+$') then damaged('pq_exec', v[2]) end
  if v[3] and not STATUSES[v[1]] then damaged('status', v[1]) end
  if v[2] == execution and (v[1] == 'started' or v[1] == 'canceled') then
    class_in(class)
    local member = id .. ':' .. execution
    if v[1] == 'canceled' or v[4] then
      if redis.call('ZREM', registry('wip', queue_of(class)), member) == 1 then
        end_unrun(id, 'canceled', now, now_iso, ttl)
      end
    else
      redis.call('HSET', job_key(id), 'status', 'queued', 'origin', class)
      redis.call('HDEL', job_key(id), 'worker_name', 'pq_node', 'pq_slot')
      lists[class] = lists[class] or {}
      table.insert(lists[class], 1, id)
      wip[class] = wip[class] or {}
      table.insert(wip[class], member)
      number = number + 1
    end
  end
end

for _, item in ipairs(cmsgpack.unpack(ARGV[5])) do
  guarded({now, now_iso, ttl}, item[1], give_back, item[1], tostring(item[2]), item[3], item[4], item[5])
end
for class, ids in pairs(lists) do
  offer(class)
  push('LPUSH', list_key(class), ids)
  push('ZREM', registry('wip', queue_of(class)), wip[class])
end
flush_tally(ttl)
flush_lines()
deliver(node, call, message, 0, 0)
if number > 0 or redis.call('EXISTS', 'pilotq:release') == 1 then wake() end
return number
