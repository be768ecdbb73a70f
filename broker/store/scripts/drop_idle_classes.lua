-- drop_idle_classes: class lists that are empty leave RQ's list of queues, and a minute later the classes; they come back with
-- their next task. RQ's compact lets a list vanish for a moment: what is there again is known again.
--
-- ARGV: 1 queue id, 2 term, 3 now (unix s), 4 seconds that a list is empty until its class goes, 5... class names.
-- Returns the number of classes removed.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local removed, now = 0, tonumber(ARGV[3])
for i = 5, #ARGV do
  local class = ARGV[i]
  local known = redis.call('HGET', 'pilotq:classes', class)
  local since = tonumber(known or '')
  if redis.call('EXISTS', list_key(class)) == 1 then
    -- What was shown to RQ's tools only while there was room is shown when others have gone.
    local room = redis.call('SCARD', 'rq:queues') < QUEUES_SHOWN
    if since or room and redis.call('SISMEMBER', 'rq:queues', list_key(class)) == 0 then offer(class) end
  elseif known and not since then
    redis.call('SREM', 'rq:queues', list_key(class))
    redis.call('HSET', 'pilotq:classes', class, ARGV[3])
  -- What RQ's cancel has left under the name of the list is adopted first.
  elseif since and now - since >= tonumber(ARGV[4]) and redis.call('EXISTS', registry('canceled', class)) == 0 then
    removed = removed + redis.call('HDEL', 'pilotq:classes', class)
  end
end
return removed
