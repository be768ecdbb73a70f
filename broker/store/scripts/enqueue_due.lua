-- enqueue_due: jobs of RQ's producers whose time has come, or that RQ left between two steps, are queued. Events due,
-- due_limited, pick_up.
--
-- A queue whose lock RQ's own scheduler holds is left to that. What has a rate limit takes its turn there.
-- ARGV: 1 queue id, 2 term, 3 now (unix s), 4 now (ISO), 5 limit, 6 how long RQ may take between two steps (s), 7 ttl of failed
--       records (s), 8... queues.
-- Returns the number of jobs that were moved or dropped.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local now, now_iso, left, moved = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5]), 0

local function enqueue(id, queue, status)
  local v = redis.pcall('HMGET', job_key(id), 'status', 'rate_limit_key', 'enqueue_at_front',
    'enqueue_at_front_on_retry', 'ended_at', 'pq_sub', 'pq_class', 'data')
  if v.err or v[1] ~= status then return end
  if (v[6] or '') ~= '' and v[8] and v[8] ~= OWN_DATA then return to_rq_list(id, queue, false, now_iso) end
  if (v[6] or '') ~= '' then
    -- One of ours, between two executions: its class list is known.
    class_in(v[7])
    redis.call('HSET', job_key(id), 'status', 'queued', 'origin', v[7])
    offer(v[7])
    redis.call('RPUSH', list_key(v[7]), id)
    return wake()
  end
  local first = v[3] == '1' or (v[4] == '1' and (v[5] or '') ~= '')
  redis.call('HSET', job_key(id), 'origin', queue)
  if not v[2] then return to_rq_list(id, queue, first, now_iso) end
  redis.call('HSET', job_key(id), 'status', 'rate_limited', 'enqueue_at_front', first and 1 or 0)
  redis.call('ZADD', 'rq:rl:' .. v[2] .. ':rate_limited', now, id)
  redis.call('SADD', 'rq:rl-keys', v[2])
  promote(v[2], now, now_iso)
end

local function move(queue, kind, status, before)
  if left <= 0 then return end
  for _, id in ipairs(redis.pcall('ZRANGEBYSCORE', registry(kind, queue), 0, before, 'LIMIT', 0, left)) do
    redis.call('ZREM', registry(kind, queue), id)
    left, moved = left - 1, moved + 1
    guarded({now, now_iso, tonumber(ARGV[7])}, id, enqueue, id, queue, status)
  end
end

for i = 8, #ARGV do
  if redis.call('EXISTS', 'rq:scheduler-lock:' .. ARGV[i]) == 0 then move(ARGV[i], 'scheduled', 'scheduled', now) end
  move(ARGV[i], 'ready', 'ready_to_enqueue', now - ARGV[6])
end
flush_tally(ARGV[7])
flush_lines()
return moved
