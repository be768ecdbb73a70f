-- write: one plain command of ours that must go through though the memory is full, and not to another queue's server.
--
-- ARGV: 1 epoch, 2... the command.
-- Returns the command's reply.
if not epoch_ok() then return epoch_error() end
return redis.call(unpack(ARGV, 2))
