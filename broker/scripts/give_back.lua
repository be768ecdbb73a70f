-- give_back: handed tasks that were never launched return to the head of their lists. Event give_back.
--
-- ARGV: 1 epoch, 2 node:incarnation, 3 number of the call, 4 mail (packed), 5 msgpack [[id, execution], ...] oldest first.
-- Returns the number of tasks that went back; ids with another execution or status are left alone.
if not epoch_ok() then return epoch_error() end
local node, call, mail = ARGV[2], ARGV[3], ARGV[4]
local lists, wip, number = {}, {}, 0
for _, item in ipairs(cmsgpack.unpack(ARGV[5])) do
  local id, execution = item[1], tostring(item[2])
  local v = redis.call('HMGET', job_key(id), 'status', 'pq_exec', 'pq_class')
  if v[1] == 'started' and v[2] == execution then
    redis.call('HSET', job_key(id), 'status', 'queued', 'origin', v[3])
    redis.call('HDEL', job_key(id), 'worker_name', 'pq_node', 'pq_lane')
    lists[v[3]] = lists[v[3]] or {}
    table.insert(lists[v[3]], 1, id)
    wip[v[3]] = wip[v[3]] or {}
    table.insert(wip[v[3]], id .. ':' .. execution)
    number = number + 1
  elseif v[1] == 'canceled' and v[2] == execution then
    -- Canceled by RQ's own button while it was handed: nothing ran, and nothing will.
    redis.call('ZREM', registry('wip', queue_of(v[3])), id .. ':' .. execution)
  end
end
for class, ids in pairs(lists) do
  push('LPUSH', list_key(class), ids)
  push('ZREM', registry('wip', queue_of(class)), wip[class])
  redis.call('SADD', 'rq:queues', list_key(class))
end
local worker = 'rq:worker:' .. string.match(node, '^(.*):')
if tonumber(redis.call('HGET', worker, 'pq_call:' .. node) or 0) < tonumber(call) then
  redis.call('HSET', worker, 'pq_call:' .. node, call)
  redis.call('RPUSH', 'pilotq:mail', mail)
end
if number > 0 then ring() end
return number
