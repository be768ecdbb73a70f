-- drop_idle_classes: class lists that are empty leave RQ's list of queues; they come back with their next task. When nothing of
-- their queue runs, is deferred or scheduled, nothing can need the class itself: it makes room for others, and is kept for a
-- requeue. It comes back with its list (RQ's compact lets one vanish for a moment).
--
-- ARGV: 1 queue id, 2 term, 3 ttl of failed records (s), 4... class names.
-- Returns the number of classes removed.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local removed, needed = 0, {}
for _, class in ipairs(redis.call('HKEYS', 'pilotq:classes:idle')) do
  if redis.call('EXISTS', list_key(class)) == 1 then
    redis.call('HSETNX', 'pilotq:classes', class, redis.call('HGET', 'pilotq:classes:idle', class))
    redis.call('SADD', 'rq:queues', list_key(class))
  end
end
for i = 4, #ARGV do
  local class, queue = ARGV[i], queue_of(ARGV[i])
  if redis.call('EXISTS', list_key(class)) == 0 then
    redis.call('SREM', 'rq:queues', list_key(class))
    needed[queue] = needed[queue] or redis.call('EXISTS', registry('wip', queue), registry('deferred', queue),
      registry('scheduled', queue))
    if needed[queue] == 0 then
      local record = redis.call('HGET', 'pilotq:classes', class)
      if record then
        redis.call('HSET', 'pilotq:classes:idle', class, record)
        redis.call('EXPIRE', 'pilotq:classes:idle', ARGV[3])
      end
      removed = removed + redis.call('HDEL', 'pilotq:classes', class)
    end
  end
end
return removed
