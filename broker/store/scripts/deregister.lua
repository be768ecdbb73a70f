-- deregister: a node is gone, cleanly or not; its record goes if that incarnation still stands.
--
-- ARGV: 1 queue id, 2 node, 3 incarnation, 4 message to the dispatcher (packed; '' when it is the caller).
-- Returns 1 if it was removed, 0 if a newer incarnation stands.
if not queue_id_ok() then return queue_id_error() end
local key = 'rq:worker:' .. ARGV[2]
redis.call('DEL', inbox_key(ARGV[2] .. ':' .. ARGV[3]))
local known = redis.call('HGET', key, 'pq_incarnation')
if known and known ~= ARGV[3] then return 0 end
redis.call('DEL', key, key .. ':executions')
enlist('SREM', key)
redis.call('HDEL', 'pilotq:nodes', ARGV[2])
if ARGV[4] ~= '' then redis.call('RPUSH', 'pilotq:events', ARGV[4]) end
return 1
