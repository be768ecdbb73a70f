-- tidy: class lists that are empty leave RQ's list of queues; they come back with their next task. When nothing of their
-- queue runs or is deferred, nothing can need the class itself: it makes room for others.
--
-- ARGV: 1 epoch, 2 term, 3... class names.
-- Returns the number of classes removed.
if not epoch_ok() then return epoch_error() end
if not term_ok() then return term_error() end
local removed, needed = 0, {}
for i = 3, #ARGV do
  local class, queue = ARGV[i], queue_of(ARGV[i])
  if redis.call('EXISTS', list_key(class)) == 0 then
    redis.call('SREM', 'rq:queues', list_key(class))
    needed[queue] = needed[queue] or redis.call('EXISTS', registry('wip', queue), registry('deferred', queue))
    if needed[queue] == 0 then removed = removed + redis.call('HDEL', 'pilotq:classes', class) end
  end
end
return removed
