-- tidy: class lists that are empty leave RQ's list of queues; they come back with their next task.
--
-- ARGV: 1 epoch, 2 term, 3... class names.
-- Returns the number removed.
if not epoch_ok() then return epoch_error() end
if not term_ok() then return term_error() end
local removed = 0
for i = 3, #ARGV do
  if redis.call('LLEN', list_key(ARGV[i])) == 0 then
    removed = removed + redis.call('SREM', 'rq:queues', list_key(ARGV[i]))
  end
end
return removed
