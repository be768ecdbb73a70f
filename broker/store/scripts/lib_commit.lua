-- Behind lib_joins.lua in the library: staged tasks become tasks, for commit.lua and release_dependents.lua.

local function staged_key(first) return 'pilotq:staged:' .. first end

-- The status of a parent. Elements have no record of their own before they run and after they finished.
local function read_parent(parent)
  local v = redis.pcall('HMGET', job_key(parent), 'status', 'pq_class', 'pq_reason', 'pq_sub')
  if v.err then return false end -- a stranger's key
  -- RQ's cancel says so while it may still run; its end is to come.
  local is_open = v[1] == 'canceled' and v[2] and not v[3]
  local status = is_open and not ((v[4] or '') ~= '' and redis.call('TTL', job_key(parent)) >= 0) and 'started' or v[1]
  redis.call('LLEN', dependents_key(parent)) -- what cannot be written to raises here, and not between two writes
  redis.call('LLEN', elementwise_key(parent))
  local array, index = string.match(parent, '^(.-)_(%d+)$')
  -- Jobs of RQ's producers may be called as elements are.
  if not array or status and not redis.call('HGET', job_key(parent), 'pq_array_of') then
    counts[parent] = count_of(text_of(parent))
    return status
  end
  local text = text_of(array)
  local position = count_of(text) and position_of(index, text)
  if not position then return false end
  elements[parent] = array
  local outcome = redis.call('BITFIELD', outcomes_key(array), 'GET', 'u2', '#' .. string.format('%d', position))[1]
  return ({[0] = 'queued', 'finished', 'failed', 'canceled'})[outcome]
end

-- The same once a call; false where nobody knows it. `past`: what only the journal knows.
local function status_of(parent, past)
  if parents[parent] == nil then parents[parent] = read_parent(parent) or past and past[parent] or false end
  return parents[parent]
end

-- -- waiting again, for requeue.lua and release_dependents.lua -----------------------------------------------------------------

local function bad(status) return status == 'failed' or status == 'stopped' or status == 'canceled' end

-- Not `status_of`, which remembers: a parent may be requeued in this very call.
local function present_status(parent)
  local status = read_parent(parent) or redis.pcall('HGET', job_key(parent), 'status')
  return type(status) == 'string' and status
end

-- Those of the parents (dependencies with spaces between) that have not ended, from an offset on; nil when one ended otherwise than
-- it is to. Also how many were looked at, and the offset to go on from when there may be more than `limit`. What has no record any
-- more had finished, as what did not is kept longer than those that it omits; but what ran and was not `omitted` had its way.
local function open_parents(after, offset, limit, omitted)
  local open, number = {}, 0
  while number < limit do
    local text, behind = string.match(after or '', '^%s*(%S+)()', offset)
    if not text then return open, number end
    number, offset = number + 1, behind
    local parent, ends = parent_of(text)
    local status = present_status(parent)
    local kind = END_LETTERS[status or omitted and 'finished']
    if kind and not string.find(ends, kind, 1, true) then return nil, number end
    if status and not kind then open[#open + 1] = text end
  end
  return open, number, offset
end

-- These parents release a task that waits again. `wait`: it may have been canceled while it waited; what stands of that in the
-- lists of parents counts no more.
local function wait_for_all(id, wait, dependencies)
  for _, text in ipairs(dependencies) do
    local parent, ends = parent_of(text)
    redis.call('RPUSH', dependents_key(parent), dependency_on(id .. '#' .. wait, ends))
    track_parent(parent)
    local array = elements[parent]
    redis.call('HSET', job_key(array or parent), array and 'pq_elementwise' or 'pq_has_dependents', '1')
  end
end

-- The tasks of `work` (see commit.lua) get what makes them tasks; `flush_ready` puts them into their lists. `staged`: they are a
-- piece of a large submission, which has been accepted: their records have a TTL, and what has expired before anybody came here
-- counts as canceled.
local function admit(work, staged, now, now_iso, ttl)
  local seen_queues, omitted = {}, {}
  local child_of = work.child_of or staged and redis.call('HGET', submit_key(work.key), 'child_of')

  local function know(class)
    local queue = queue_of(class)
    if not seen_queues[queue] then redis.call('SADD', 'rq:queues', list_key(queue)) end
    seen_queues[queue] = true
  end

  local function is_there(id, size)
    local there = not staged or redis.call('PERSIST', job_key(id)) == 1
    if child_of then joins.adopt(child_of, id, there) end
    if there then return true end
    count_end(work.key, 'canceled', size)
    return false
  end

  -- How a parent has ended; nil if it has not. One without a record had finished: it was there at the commit.
  local function end_of(parent)
    local status = status_of(parent, work.past)
    return END_LETTERS[omitted[elements[parent]] and 'canceled' or status or 'finished']
  end

  local function is_broken(item)
    for _, text in ipairs(item[3]) do
      local parent, ends = parent_of(text)
      local kind = end_of(parent)
      if kind and not string.find(ends, kind, 1, true) then return true end
    end
    return false
  end

  -- The parents of an item that have not ended will release it.
  local function wait_for_parents(item)
    local left = 0
    for _, text in ipairs(item[3]) do
      local parent, ends = parent_of(text)
      if not end_of(parent) then
        left = left + 1
        redis.call('RPUSH', dependents_key(parent), dependency_on(item[1], ends))
        track_parent(parent)
        if elements[parent] then
          redis.call('HSET', job_key(elements[parent]), 'pq_elementwise', '1')
        else
          redis.call('HSET', job_key(parent), 'pq_has_dependents', '1')
        end
      end
    end
    return left
  end

  -- Of a task with very many parents there are several items: until the last one it waits for one more.
  local function admit_waiting(item)
    local id, class, part = item[1], item[2], item[5]
    local is_first, more = part == nil or part == 1, part or 0
    know(class)
    if is_first and not is_there(id, item[4]) then return end
    if not is_first and redis.call('HGET', job_key(id), 'status') ~= 'deferred' then return end
    if is_broken(item) then
      omit(id, now, now_iso, ttl)
      parents[id], omitted[id] = 'canceled', true
      return
    end
    local left = wait_for_parents(item) + more
    if not is_first then left = redis.call('HINCRBY', job_key(id), 'pq_open_parents', left) end
    if left == 0 then
      if not is_first then redis.call('ZREM', registry('deferred', queue_of(class)), id) end
      queue_up(id, class)
    elseif is_first then
      redis.call('HSET', job_key(id), 'pq_open_parents', left, 'origin', queue_of(class))
      redis.call('ZADD', registry('deferred', queue_of(class)), ADOPTED + now, id)
    end
  end

  local function admit_elementwise(item)
    local id, class = item[1], item[2]
    know(class)
    if not is_there(id, item[4]) then return end
    redis.call('HSET', job_key(id), 'origin', queue_of(class), 'pq_parents', #item[3])
    redis.call('ZADD', registry('deferred', queue_of(class)), ADOPTED + now, id)
    for number, parent in ipairs(item[3]) do
      redis.call('RPUSH', elementwise_key(parent), (number - 1) .. ':' .. id)
      track_parent(parent)
      -- One that was deleted since the commit: cancel_orphans.lua finds what waits for it.
      local status = status_of(parent, work.past)
      if status then redis.call('HSET', job_key(parent), 'pq_elementwise', '1') end
      -- Elements of the parent that ended before this commit woke nobody for us: look at all of them once.
      if redis.call('EXISTS', outcomes_key(parent)) == 1 then look_at(parent, 0, item[4] - 1) end
    end
  end

  for _, name in ipairs(staged and work.extra or {}) do redis.call('PERSIST', name) end
  for _, group in ipairs(work.groups) do
    know(group[1])
    for _, id in ipairs(group[2]) do
      if is_there(id, work.sizes and work.sizes[id] or 1) then line_up(id, group[1]) end
    end
  end
  local moment = {now, now_iso, ttl}
  for _, item in ipairs(work.waits) do guarded(moment, item[1], admit_waiting, item) end
  for _, item in ipairs(work.elementwise) do guarded(moment, item[1], admit_elementwise, item) end
end

-- The next piece of a large submission; false when there is none (any more).
local function admit_piece(first, now, now_iso, ttl)
  local piece = redis.call('LPOP', staged_key(first))
  if piece then admit(cmsgpack.unpack(piece), true, now, now_iso, ttl) end
  return piece and true
end
