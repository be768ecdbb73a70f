-- cancel: the user wants these tasks not to run (any more). Event cancel.
--
-- ARGV: 1 epoch, 2 now (unix s), 3 now (ISO), 4 ttl of canceled records (s), 5... ids.
-- Returns for each id 'canceled' (it was waiting), 'told' (it runs, or elements of it do: their workers were told),
-- its status when it had ended, or 'unknown'. Ids stay in the middle of their lists: claim drops them.
if not epoch_ok() then return epoch_error() end
local now, now_iso, ttl = tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])

local function tell(id, f)
  redis.call('HSET', job_key(id), 'pq_cancel', '1')
  if f.node then
    redis.call('RPUSH', inbox_key(f.node), string.char(148) .. cmsgpack.pack('stop', id, tonumber(f.execution), 'canceled'))
  end
  return 'told'
end

-- An array: elements not handed out end here; those that are handed or run are told one by one.
local function cancel_array(id, f)
  local count, position = tonumber(string.match(f.array, '(%d+)$')), tonumber(f.next)
  local waiting = count - position
  redis.call('HSET', job_key(id), 'pq_cancel', '1', 'pq_next', count)
  local running = redis.call('ZRANGEBYLEX', registry('wip', queue_of(f.class)), '[' .. id .. '_', '(' .. id .. '`')
  for _, member in ipairs(running) do
    local element = string.match(member, '^(.*):')
    local v = redis.call('HMGET', job_key(element), 'pq_node', 'pq_exec', 'status')
    if v[3] == 'started' then tell(element, {node = v[1], execution = v[2]}) end
  end
  if waiting > 0 then
    if f.status ~= 'started' then
      redis.call('HSET', job_key(id), 'status', 'started', 'origin', queue_of(f.class), 'started_at', now_iso)
      redis.call('ZADD', registry('wip', queue_of(f.class)), 'inf', id .. ':0')
    end
    redis.call('ZREM', registry('deferred', queue_of(f.class)), id)
    if not f.each then set_bits(id, position, count - 1, 3) end
    count_end(f.submission, 'canceled', waiting)
    array_ended(id, waiting, waiting, now, now_iso, ttl, ttl)
  end
  return #running > 0 and 'told' or 'canceled'
end

-- An array that waits element by element has no position: what was not released yet ends here.
local function cancel_each(id, f)
  local count, waiting = tonumber(string.match(f.array, '(%d+)$')), 0
  for position = 0, count - 1 do
    local index = string.match(f.array, '^(%d+)') + position * string.match(f.array, ':(%d+):')
    local outcome = redis.call('BITFIELD', bits_key(id), 'GET', 'u2', '#' .. position)[1]
    if outcome == 0 and redis.call('EXISTS', job_key(id .. '_' .. string.format('%d', index))) == 0 then
      set_bits(id, position, position, 3)
      waiting = waiting + 1
    end
  end
  f.next = count - waiting
  f.each = true
  return cancel_array(id, f)
end

local function cancel(id)
  local v = redis.call('HMGET', job_key(id), 'status', 'origin', 'pq_exec', 'pq_node', 'pq_sub', 'pq_array', 'pq_next',
    'pq_class', 'pq_kids', 'pq_name', 'pq_at', 'pq_parents', 'pq_array_of', 'pq_pos')
  local status = v[1]
  if not status then return 'unknown' end
  local f = {status = status, class = v[8] or v[2], execution = v[3] or '0', node = v[4] or nil, submission = v[5],
    array = v[6], next = v[7], name = v[10], queued = v[11]}
  if status == 'finished' or status == 'failed' or status == 'stopped' or status == 'canceled' then return status end
  if v[6] then return v[12] and cancel_each(id, f) or cancel_array(id, f) end
  if status == 'started' then return tell(id, f) end
  local queue = queue_of(f.class)
  if v[13] then
    local submission = redis.call('HGET', job_key(v[13]), 'pq_sub')
    redis.call('DEL', job_key(id))
    set_bits(v[13], tonumber(v[14]), tonumber(v[14]), 3)
    count_end(submission, 'canceled', 1)
    array_ended(v[13], 1, 1, now, now_iso, ttl, ttl)
    return 'canceled'
  end
  redis.call('ZREM', registry('deferred', queue), id)
  redis.call('HSET', job_key(id), 'origin', queue)
  end_unrun(id, f, 'canceled', 'canceled', ARGV[2], now_iso, ttl, 1)
  redis.call('ZADD', registry('canceled', queue), now, id)
  if v[9] then redis.call('RPUSH', 'pilotq:release', 'k:' .. id) end
  return 'canceled'
end

local answer = {}
for i = 5, #ARGV do answer[#answer + 1] = cancel(ARGV[i]) end
flush_tally(ttl)
flush_lines()
ring()
return answer
