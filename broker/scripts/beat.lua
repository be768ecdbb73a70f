-- beat: a worker is alive.
--
-- ARGV: 1 epoch, 2 node, 3 incarnation, 4 ttl of the worker's record (s), 5... fields and values.
-- Returns 1; 0 when a newer incarnation has registered; -1 when the record is gone (register again).
if not epoch_ok() then return epoch_error() end
local key = 'rq:worker:' .. ARGV[2]
local known = redis.call('HGET', key, 'pq_incarnation')
if not known then return -1 end
if known ~= ARGV[3] then return 0 end
redis.call('HSET', key, unpack(ARGV, 5))
redis.call('EXPIRE', key, ARGV[4])
return 1
