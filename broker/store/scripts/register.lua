-- register: a worker registers its node. The newest incarnation of a node stands.
--
-- ARGV: 1 queue id, 2 node, 3 incarnation, 4 node record (JSON), 5 message (packed StateReport), 6 ttl of the worker's record (s),
--       7... fields and values of RQ's worker record.
-- Returns 1, or 0 when a newer incarnation has registered.
if not queue_id_ok() then return queue_id_error() end
local key = 'rq:worker:' .. ARGV[2]
if tonumber(redis.call('HGET', key, 'pq_incarnation') or 0) > tonumber(ARGV[3]) then return 0 end
redis.call('DEL', key, key .. ':executions')
redis.call('HSET', key, 'pq_incarnation', ARGV[3], unpack(ARGV, 7))
redis.call('EXPIRE', key, ARGV[6])
enlist('SADD', key)
redis.call('SADD', 'rq:queues', list_key('default'))
redis.call('HSET', 'pilotq:nodes', ARGV[2], ARGV[4])
redis.call('SREM', 'pilotq:leaving', ARGV[2])
redis.call('RPUSH', 'pilotq:events', ARGV[5])
return 1
