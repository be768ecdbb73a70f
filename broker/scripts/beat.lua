-- beat: a worker is alive.
--
-- ARGV: 1 epoch, 2 node, 3 incarnation, 4 ttl of the worker's record (s), 5... fields and values, all of RQ's record.
-- Returns 1; 0 when a newer incarnation has registered, or this one was given up. A record that expired (a machine that
-- was asleep) is made again.
if not epoch_ok() then return epoch_error() end
local key = 'rq:worker:' .. ARGV[2]
local known = redis.call('HGET', key, 'pq_incarnation')
if not known then
  local record = redis.call('HGET', 'pilotq:nodes', ARGV[2])
  known = record and tostring(cjson.decode(record).incarnation)
end
if known ~= ARGV[3] then return 0 end
enlist('SADD', key)
redis.call('HSET', key, 'pq_incarnation', ARGV[3], unpack(ARGV, 5))
redis.call('EXPIRE', key, ARGV[4])
return 1
