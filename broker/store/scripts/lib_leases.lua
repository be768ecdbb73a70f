-- Behind lib.lua in the library: leases of runs of elements.
--
-- A lease says that a node has some elements of an array, at consecutive positions, for one execution. Such an element has
-- no record while it is short and ends well. `own_record` makes the one it needs when it lives longer, fails, is stopped or
-- given back; from then on that record is the truth about it.

local LEASES = 'pilotq:leases' -- hash: <array>:<first position> -> elements that have neither ended nor got a record
local function leases_key(array) return 'pilotq:leases:' .. array end
-- A bit for each position: the element has left its lease with a record. Somebody may delete that, and it is not in the lease again.
local function recorded_key(array) return 'pilotq:recorded:' .. array end

-- The lease whose elements are around this position; nil when there is none.
local function lease_around(array, position)
  local member = redis.call('ZREVRANGEBYSCORE', leases_key(array), position, '-inf', 'LIMIT', 0, 1)[1]
  if not member then return end
  local first, count, execution, slots, started, address = string.match(member, '^(%d+) (%d+) (%d+) (%d+) (%S+) (.+)$')
  first, count = tonumber(first), tonumber(count)
  if position >= first + count then return end
  return {field = array .. ':' .. string.format('%d', first), member = member, first = first, count = count,
    execution = execution, slots = tonumber(slots), started = started, address = address}
end

-- Is a record under the id of an element its own? A producer's job may have taken the id of one that has none.
local function is_record_of(array, id) return redis.pcall('HGET', job_key(id), 'pq_array_of') == array end

-- The lease of an element that has not ended and has got no record; nil when there is none.
local function lease_of(array, position, id)
  local lease = lease_around(array, position)
  if not lease then return end
  local at = string.format('%d', position)
  if redis.call('BITFIELD', outcomes_key(array), 'GET', 'u2', '#' .. at)[1] ~= 0 then return end
  if redis.call('GETBIT', recorded_key(array), at) == 1 then return end
  if redis.call('EXISTS', job_key(id)) == 1 then
    -- It may be only what a function has noted in its job, which had no record yet.
    local v = redis.pcall('HMGET', job_key(id), 'meta', 'data', 'status')
    lease.is_taken = v.err or not v[1] or v[2] or v[3]
  end
  return lease
end

-- The bytes of the outcomes around `number` elements from `first` on, with these finished; nil when one of them has ended.
local function finished_bytes(array, first, number)
  local from = math.floor(first / 4)
  local to = math.floor((first + number - 1) / 4)
  local bytes = redis.call('GETRANGE', outcomes_key(array), from, to)
  local found = {}
  for at = from, to do
    local byte = string.byte(bytes, at - from + 1) or 0
    for k = math.max(first - 4 * at, 0), math.min(first + number - 1 - 4 * at, 3) do
      if bit.band(bit.rshift(byte, 6 - 2 * k), 3) ~= 0 then return end
      byte = bit.bor(byte, bit.lshift(1, 6 - 2 * k))
    end
    found[#found + 1] = string.char(byte)
  end
  return table.concat(found)
end

local function add_lease(array, first, count, execution, slots, started, address)
  local member = string.format('%d %d %d %d %s %s', first, count, execution, slots, started, address)
  redis.call('ZADD', leases_key(array), string.format('%d', first), member)
  redis.call('HSET', LEASES, array .. ':' .. string.format('%d', first), count)
end

-- So many elements have left their lease: ended, or with a record of their own.
local function leave_lease(array, lease, number)
  if redis.call('HINCRBY', LEASES, lease.field, -number) > 0 then return end
  redis.call('HDEL', LEASES, lease.field)
  redis.call('ZREM', leases_key(array), lease.member)
  if redis.call('EXISTS', leases_key(array)) == 0 then redis.call('DEL', recorded_key(array)) end
end

-- The element has, or gets, a record for which its lease does not stand.
local function mark_recorded(array, position)
  if redis.call('EXISTS', leases_key(array)) == 1 then
    redis.call('SETBIT', recorded_key(array), string.format('%d', position), 1)
  end
end

-- All leases of an array end: it has ended, so what they say is left was deleted.
drop_leases = function(array)
  local members = redis.call('ZRANGE', leases_key(array), 0, -1)
  if #members == 0 then return end
  for _, member in ipairs(members) do redis.call('HDEL', LEASES, array .. ':' .. string.match(member, '^(%d+)')) end
  redis.call('DEL', leases_key(array), recorded_key(array))
end

-- The element gets the record that it would have if it had been handed out by itself; false when its array has none.
-- Raises where that is damaged, before anything is written.
local function own_record(array, position, lease)
  local text = text_of(array)
  if not text or lease.is_taken then return false end
  count_in(text)
  local v = redis.call('HMGET', job_key(array), 'data', 'description', 'created_at', 'pq_sub', 'pq_class', 'pq_retries', 'pq_cancel')
  local queue = queue_of(class_in(v[5]))
  local extra = {'status', 'started', 'origin', queue, 'pq_exec', lease.execution, 'pq_node', lease.address, 'worker_name',
    string.match(lease.address, '^(.*):'), 'started_at', lease.started}
  local function add(field, value)
    extra[#extra + 1] = field
    extra[#extra + 1] = value
  end
  if position < lease.first + lease.slots then add('pq_slot', '1') end -- it may have begun by itself
  if number_in('pq_retries', v[6], 0) > 0 then add('pq_retries', v[6]) end
  if v[7] then add('pq_cancel', v[7]) end
  local f = {array = text, data = v[1], description = v[2], created = v[3], submission = v[4], class = v[5]}
  local id = make_element(array, position, f, extra)
  redis.call('ZADD', registry('wip', queue), 'inf', id .. ':' .. lease.execution)
  mark_recorded(array, position)
  leave_lease(array, lease, 1)
  return true
end

-- Array, position and submission of an element by its id; nil of what is none of an array that is there.
local function element_of(id)
  local array, index = string.match(id, '^(.-)_(%d+)$')
  local text = array and text_of(array)
  local position = count_of(text) and position_of(index, text)
  if position then return array, position, redis.call('HGET', job_key(array), 'pq_sub') end
end

-- Array, position and lease of an element by its id; nil when no lease holds it.
local function leased(id)
  local array, position = element_of(id)
  local lease = position and lease_of(array, position, id)
  if lease then return array, position, lease end
end

-- True when an element that a lease holds has got a record now.
local function record_leased(id)
  local array, position, lease = leased(id)
  return lease and own_record(array, position, lease)
end

-- An element that can get no record ends without one. Without its array's record nobody else counts it.
local function end_leased(array, position, id, lease, status, now, now_iso, ttl)
  set_outcomes(array, position, position, status == 'finished' and 1 or status == 'canceled' and 3 or 2)
  leave_lease(array, lease, 1)
  count_end(submission_of(id), status, 1)
  if redis.call('EXISTS', job_key(array)) == 1 then
    if redis.call('HGET', job_key(array), 'pq_elementwise') then
      redis.call('RPUSH', 'pilotq:release', string.format('e:%s:%d:%d', array, position, position))
    end
    array_ended(array, 1, status == 'finished' and 0 or 1, now, now_iso, ttl, ttl, status == 'failed' and 1 or 0)
  elseif redis.call('EXISTS', leases_key(array)) == 0 then
    redis.call('DEL', outcomes_key(array), returned_key(array))
  end
end

-- An element of which something must become gets its record: 'record'; nil when no lease of this execution holds it. It gets none when
-- its array was deleted or is damaged (it has failed then), or when a producer's job has its id: it ends with `status`, or
-- failed, which is returned.
local function record_or_end(id, array, position, execution, status, now, now_iso, ttl)
  local lease
  if array == '' then array, position, lease = leased(id) else lease = lease_of(array, position, id) end
  if not lease or lease.execution ~= execution then return end
  local done, made = pcall(own_record, array, position, lease)
  if done and made then return 'record' end
  if not done then
    pcall(end_damaged, array, type(made) == 'table' and made.err or tostring(made), now, now_iso, ttl)
    status = 'failed'
  end
  end_leased(array, position, id, lease, status, now, now_iso, ttl)
  return status
end

-- A task by itself is a run of length one. Its lease is its place in wip: a score below 0 says by number which node has it
-- (pilotq:holders), and, where that is odd, that it has a slot. Its record says until its end, or until it needs more, that it waits.
local function lease_score(queue, id, execution)
  local score = tonumber(redis.call('ZSCORE', registry('wip', queue), id .. ':' .. execution) or '0')
  return score < 0 and score
end

-- Queue, execution, score and status of a task that a lease holds; nil when none does. `class`: what is known of it elsewhere.
local function lease_of_task(id, class)
  local v = redis.pcall('HMGET', job_key(id), 'status', 'pq_exec', 'pq_class', 'origin')
  if v.err or v[1] ~= 'queued' and v[1] ~= 'canceled' then return end
  local queue, execution = queue_of(pcall(class_in, v[3]) and v[3] or class or v[4] or ''), string.format('%d', (tonumber(v[2] or '') or 0) + 1)
  local score = lease_score(queue, id, execution)
  if score then return queue, execution, score, v[1] end
end

-- The record of a task that a lease holds (for this execution, if one is given) says so from now on; false when none does.
local function own_task(id, wanted, class)
  local queue, execution, score, status = lease_of_task(id, class)
  if not score or (wanted or execution) ~= execution then return false end
  local address = redis.call('HGET', 'pilotq:holders', string.format('%d', math.floor(-score / 2))) or ':'
  -- RQ's cancel has set the status, and nothing else.
  redis.call('HSET', job_key(id), 'status', status == 'queued' and 'started' or status, 'origin', queue, 'pq_exec', execution,
    'pq_node', address, 'worker_name', string.match(address, '^(.*):'))
  if score % 2 == 1 then redis.call('HSET', job_key(id), 'pq_slot', '1') end
  if execution ~= '1' then redis.call('HDEL', job_key(id), 'started_at') end -- that is of the one before
  redis.call('ZADD', registry('wip', queue), 'inf', id .. ':' .. execution)
  return true
end

-- How many elements of an array are held by leases.
number_leased = function(array)
  local number = 0
  for _, member in ipairs(redis.call('ZRANGE', leases_key(array), 0, -1)) do
    number = number + (tonumber(redis.call('HGET', LEASES, array .. ':' .. string.match(member, '^(%d+)')) or '') or 0)
  end
  return number
end

-- A worker ends what it has of this task or array: with `unstarted`, a reason, only what it has not begun.
local function stop_on(node, id, execution, unstarted)
  local message = cmsgpack.pack('stop', id, tonumber(execution), unstarted or 'canceled')
  if unstarted then message = message .. cmsgpack.pack(true) end
  send(node, 1, string.char(unstarted and 149 or 148) .. message)
end

-- Nodes that leases of an array name end what they have of it, and so do `nodes`. Returns whether there are any.
local function stop_leased(array, unstarted, nodes)
  nodes = nodes or {}
  for _, member in ipairs(redis.call('ZRANGE', leases_key(array), 0, -1)) do
    nodes[string.match(member, '^%d+ %d+ %d+ %d+ %S+ (.+)$') or ''] = true
  end
  nodes[''] = nil
  for node in pairs(nodes) do stop_on(node, array, 0, unstarted) end
  return next(nodes) ~= nil
end

-- Elements of an array that have a record and are with a node: '<id>:<execution>'.
local function records_running(array, queue) return in_wip(queue, array .. '_') end

-- What waits of an array ends: what was not handed out now, what nodes have not begun by a message to them; what waits again, or
-- element by element, is found by release_dependents.lua in slices. What runs goes on. `why` is noted once: why the array ends so;
-- without it the caller has stopped what nodes have.
end_waiting = function(array, why, now, now_iso, ttl)
  local v = redis.call('HMGET', job_key(array), 'status', 'pq_class', 'pq_sub', 'pq_next', 'pq_parents', 'pq_stopped')
  if why and v[6] then return end
  local count, queue = count_in(text_of(array)), queue_of(class_in(v[2]))
  local handed = v[5] and count or number_in('pq_next', v[4])
  if why then
    redis.call('HSET', job_key(array), 'pq_stopped', why)
    local nodes = {}
    for _, member in ipairs(records_running(array, queue)) do
      local f = redis.pcall('HMGET', job_key(string.match(member, '^(.*):')), 'pq_node', 'pq_running')
      if f[1] and not f[2] then nodes[f[1]] = true end
    end
    stop_leased(array, why, nodes)
  end
  redis.call('HSET', job_key(array), 'pq_next', count)
  redis.call('ZREM', registry('deferred', queue), array)
  if handed > 0 and v[1] ~= 'started' then
    if v[1] ~= 'canceled' then redis.call('HSET', job_key(array), 'status', 'started', 'origin', queue, 'started_at', now_iso) end
    redis.call('ZADD', registry('wip', queue), 'inf', array .. ':0')
  end
  if handed > 0 then redis.call('RPUSH', 'pilotq:release', string.format('c:%s:0:%d', array, handed - 1)) end
  if handed < count then end_elements(array, v[3], handed, count - 1, now, now_iso, ttl) end
end
