-- send: a message from one worker to another, into its inbox, if that incarnation of it still stands.
--
-- ARGV: 1 queue id, 2 node, 3 incarnation, 4 message (packed list).
-- Returns 1, or 0 when nobody would read it: an inbox that is made again after its worker has gone would stay for ever.
if not queue_id_ok() then return queue_id_error() end
if redis.call('HGET', 'rq:worker:' .. ARGV[2], 'pq_incarnation') ~= ARGV[3] then return 0 end
redis.call('XADD', inbox_key(ARGV[2] .. ':' .. ARGV[3]), '*', 'm', ARGV[4])
return 1
