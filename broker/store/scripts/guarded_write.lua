-- guarded_write: one plain command of ours that must go through though the memory is full, and not to another queue's
-- server.
--
-- ARGV: 1 queue id, 2... the command.
-- Returns the command's reply.
if not queue_id_ok() then return queue_id_error() end
return redis.call(unpack(ARGV, 2))
