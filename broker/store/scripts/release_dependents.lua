-- release_dependents: dependents of ended tasks are queued, or omitted; tasks that join end with their last child. Events release,
-- omit, release_limited, join_finished, join_failed, join_stopped, join_canceled.
--
-- Takes entries from the front of pilotq:release until about `limit` dependents were handled; what is left of an entry
-- goes back to the front.
--   'k:<id>' a task or array has finished, 'f:<id>' it failed, 'o:<id>' it was stopped, canceled or deleted: what waits for
--      all of it is in pilotq:dependents:<id>; each entry there says which of these release it;
--   'e:<array>:<first>:<last>' elements (positions) have ended: arrays in pilotq:elementwise:<array> wait for each of them, and
--      tasks in pilotq:dependents:<array>_<index>; those that have not ended are passed over, what was seen before counts once.
--      A fifth part is the number of arrays that were handled of the first position;
--   'c:<array>:<first>:<last>' the array, or what waits of it, was canceled: what waits of these elements ends;
--   's:<first number>' a large submission was accepted: the pieces of it that are left become tasks;
--   'w:<id>:<wait>:<offset>' a task that waits again looks at the parents that are left in its list of very many;
--   'x:<array>:<ttl>' the array has ended, and what stood before this was handled: its record is kept so many seconds more.
--   'j:<id>' a task that joins has no process any more, or was canceled: it may end, or its children are to be canceled.
-- ARGV: 1 queue id, 2 term, 3 now (unix s), 4 now (ISO), 5 limit, 6 ttl of canceled records (s), 7 ttl of finished ones.
-- Returns {number handled, entries left, [id of a canceled task that joins, [child, ...], ...]}: the caller cancels these children, and
-- takes them out of the list of the task. Until then the entry stays.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local now, now_iso, limit, ttl, ttl_finished = ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6], ARGV[7]
local moment = {now, now_iso, ttl}
local PIECE_WORTH = 200 -- of the limit, a piece of a submission

-- A producer's job has nothing to wait for any more. With a rate limit it takes its turn there.
local function release_rq_job(id, class)
  local v = redis.call('HMGET', job_key(id), 'rate_limit_key', 'enqueue_at_front')
  forget_parents(id)
  begin_wait(id)
  if v[1] then
    redis.call('HSET', job_key(id), 'status', 'rate_limited', 'origin', queue_of(class))
    redis.call('ZADD', 'rq:rl:' .. v[1] .. ':rate_limited', now, id)
    promote(v[1], now, now_iso)
  elseif v[2] == '1' then
    redis.call('HSET', job_key(id), 'status', 'queued', 'origin', class)
    offer(class)
    redis.call('LPUSH', list_key(class), id)
  else
    queue_up(id, class)
  end
end

-- An entry names the wait that it is for: who was canceled and requeued meanwhile waits anew, and counts that parent no more.
local function release(id, wait, ends, kind)
  local v = redis.call('HMGET', job_key(id), 'status', 'pq_class', 'pq_sub', 'pq_open_parents', 'pq_wait')
  if (v[5] or '') ~= wait then return end
  if v[2] and not STATUSES[v[1]] then damaged('status', v[1]) end
  if v[1] ~= 'deferred' and not (v[1] == 'queued' and is_hidden(id, v[3] or '')) then return end
  class_in(v[2])
  if not string.find(ends, kind, 1, true) then return omit(id, now, now_iso, ttl) end
  local open = number_in('pq_open_parents', v[4]) - 1
  redis.call('HSET', job_key(id), 'pq_open_parents', string.format('%d', open), unpack(open > 0 and {} or {'pq_released', now}))
  if open > 0 then return end
  redis.call('ZREM', registry('deferred', queue_of(v[2])), id)
  if v[3] == '' then release_rq_job(id, v[2]) else queue_up(id, v[2]) end
end

local function release_dependents_of(parent, kind, array)
  -- One that did not finish may run again meanwhile: its next end counts. Of an element the outcome says that, too.
  local status = kind ~= 'k' and not (array and not is_record_of(array, parent)) and redis.pcall('HMGET', job_key(parent), 'status')[1]
  if status and STATUSES[status] and not ENDED[status] then return 0, false end
  local dependents = redis.call('LPOP', dependents_key(parent), limit) or {}
  for _, entry in ipairs(dependents) do
    local dependent, ends = parent_of(entry)
    local id, wait = string.match(dependent, '^(.*)#([0-9a-v]+)$')
    if ends == 'j' then
      guarded(moment, id, joins.count_end, id, wait, parent, kind, now, now_iso, ttl_finished, ttl)
    else
      guarded(moment, id or dependent, release, id or dependent, wait or '', ends, kind)
    end
  end
  return #dependents, redis.call('EXISTS', dependents_key(parent)) == 1
end

-- Parent `number` of the child's element at `position` has ended with `outcome` (two bits).
local function release_element(child, number, position, outcome)
  local v = redis.call('HMGET', job_key(child), 'status', 'pq_class', 'pq_parents', 'pq_first_attempt', 'data', 'description',
    'created_at', 'pq_sub', 'pq_retries', 'pq_cancel')
  if not v[1] or v[10] then return end
  local text = text_of(child)
  local count = count_in(text)
  local parents, first_attempt = number_in('pq_parents', v[3]), number_in('pq_first_attempt', v[4], 1)
  class_in(v[2])
  if position >= count then return end
  if redis.call('BITFIELD', outcomes_key(child), 'GET', 'u2', '#' .. position)[1] ~= 0 then return end
  if outcome ~= 1 then
    return end_elements(child, v[8], position, position, now, now_iso, ttl)
  end
  -- A bit for each parent, so that an element seen twice counts once.
  local field = 'w' .. string.format('%d', position)
  local seen = bit.bor(tonumber(redis.call('HGET', elementwise_key(child) .. ':seen', field) or 0), bit.lshift(1, number))
  redis.call('HSET', elementwise_key(child) .. ':seen', field, seen)
  if seen ~= bit.lshift(1, parents) - 1 then return end
  redis.call('HDEL', elementwise_key(child) .. ':seen', field)
  if v[1] == 'deferred' then
    redis.call('ZREM', registry('deferred', queue_of(v[2])), child)
    redis.call('HSET', job_key(child), 'status', 'started', 'started_at', now_iso,
      'pq_next', string.format('%d', count))
    redis.call('ZADD', registry('wip', queue_of(v[2])), 'inf', child .. ':0')
  end
  local index = index_at(text, position)
  if redis.call('EXISTS', job_key(child .. '_' .. string.format('%d', index))) == 1 then return end
  local id = make_element(child, position,
    {array = text, data = v[5], description = v[6], created = v[7], submission = v[8], class = v[2]},
    {'status', 'queued', 'pq_exec', first_attempt - 1, 'pq_retries', v[9] or '0', 'pq_released', now})
  queue_up(id, v[2])
end

-- The arrays that wait for elements of this one, from a place in their list on; of few they are read once.
local PAGE, page = 200, {}

local function waiting_arrays(array, first)
  if page.array ~= array or page.first ~= first then
    page = {array = array, first = first, entries = redis.call('LRANGE', elementwise_key(array), first, first + PAGE - 1)}
  end
  return page.entries
end

-- One ended element, for the arrays from `first` on: returns how much was handled, and where to go on if something is left of it.
local function release_position(array, text, ended, position, first)
  local outcome = redis.call('BITFIELD', outcomes_key(array), 'GET', 'u2', '#' .. position)[1]
  if outcome == 0 and ended then outcome = 3 end -- somebody deleted the outcomes
  if outcome == 0 then return 1 end
  local children = waiting_arrays(array, first)
  for _, entry in ipairs(children) do
    local number, child = string.match(entry, '^(%d+):(.*)$')
    if child then guarded(moment, child, release_element, child, tonumber(number), position, outcome) end
  end
  if #children == PAGE then return PAGE, first + PAGE end
  local element = array .. '_' .. string.format('%d', index_at(text, position))
  local handled, more = release_dependents_of(element, ({'k', 'f', 'o'})[outcome], array)
  return 1 + #children + handled, more and first + #children
end

-- One element of a canceled array: a retried one, one that was given back, or one that waited for another array's.
local function sweep_position(array, submission, text, position)
  if redis.call('BITFIELD', outcomes_key(array), 'GET', 'u2', '#' .. position)[1] ~= 0 then return 0.1 end
  local element = array .. '_' .. string.format('%d', index_at(text, position))
  local status = redis.pcall('HGET', job_key(element), 'status')
  if type(status) ~= 'string' then status = nil end
  if status == 'queued' or status == 'scheduled' then
    end_unrun(element, 'canceled', now, now_iso, ttl)
  elseif not status and not lease_of(array, position, element) then
    end_elements(array, submission, position, position, now, now_iso, ttl)
  end
  return 1
end

-- The positions of an entry, as far as the limit goes.
local function walk(kind, array, position, last, first, budget)
  local v = redis.pcall('HMGET', job_key(array), 'pq_array', 'pq_sub', 'pq_cancel', 'status', 'pq_stopped')
  if not v[1] then return 0 end -- somebody deleted it
  if kind == 'c' and not (v[3] or v[5]) then return 0 end -- it has ended, and runs again
  count_in(v[1])
  local handled = 0
  while position <= last and handled < budget do
    local number, rest
    if kind == 'e' then
      number, rest = release_position(array, v[1], ENDED[v[4]], position, first)
    else
      number = sweep_position(array, v[2], v[1], position)
    end
    handled = handled + number
    if not rest then position = position + 1 end
    first = rest or 0
  end
  if position <= last then
    local rest = first > 0 and string.format(':%d', first) or ''
    redis.call('LPUSH', 'pilotq:release', string.format('%s:%s:%d:%d%s', kind, array, position, last, rest))
  end
  return handled
end

local PARENTS = 1000

-- A task that was requeued: some of its parents. Until the last ones it waits for one more.
local function wait_on(id, wait, offset)
  local v = redis.call('HMGET', job_key(id), 'status', 'pq_class', 'pq_wait', 'pq_after', 'pq_open_parents', 'pq_sub')
  if v[3] ~= wait or v[1] ~= 'deferred' and not (v[1] == 'queued' and is_hidden(id, v[6] or '')) then return 0 end
  class_in(v[2])
  local open, number, rest = open_parents(v[4], offset, PARENTS, true)
  if not open then
    omit(id, now, now_iso, ttl)
    return number
  end
  local left = number_in('pq_open_parents', v[5]) + #open - (rest and 0 or 1)
  wait_for_all(id, wait, open)
  redis.call('HSET', job_key(id), 'pq_open_parents', string.format('%d', left))
  if rest then
    redis.call('LPUSH', 'pilotq:release', string.format('w:%s:%s:%d', id, wait, rest))
  elseif left == 0 then
    redis.call('ZREM', registry('deferred', queue_of(v[2])), id)
    queue_up(id, v[2])
  end
  return number
end

local handled, unwanted = 0, {}
while handled < limit do
  local entry = redis.call('LPOP', 'pilotq:release')
  if not entry then break end
  local kind, rest = string.match(entry, '^(%a):(.*)$')
  handled = handled + 1
  if kind == 'k' or kind == 'f' or kind == 'o' then
    local done, number, more = guarded(nil, rest, release_dependents_of, rest, kind)
    if more then redis.call('LPUSH', 'pilotq:release', entry) end
    handled = handled + (done and number or 0)
  elseif kind == 's' then
    if admit_piece(rest, now, now_iso, ttl) then redis.call('LPUSH', 'pilotq:release', entry) end
    handled = handled + PIECE_WORTH
  elseif kind == 'x' then
    local array, seconds = string.match(rest, '^(.*):(%d+)$')
    guarded(nil, array, expire_array, array, tonumber(seconds))
  elseif kind == 'j' then
    local done, children = guarded(moment, rest, joins.look, rest, limit, now, now_iso, ttl_finished, ttl)
    if done and #children > 0 then
      for _, item in ipairs({rest, children}) do unwanted[#unwanted + 1] = item end
      handled = handled + #children
    end
  elseif kind == 'w' then
    local id, wait, offset = string.match(rest, '^(.*):(%d+):(%d+)$')
    local done, number = guarded(moment, id, wait_on, id, wait, tonumber(offset))
    handled = handled + (done and number or 0)
  else
    local array, first, last, child = string.match(rest or '', '^(.-):(%d+):(%d+):?(%d*)$')
    local done, number = guarded(moment, array, walk, kind, array, tonumber(first), tonumber(last), tonumber(child) or 0,
      limit - handled)
    handled = handled + (done and number or 0)
  end
end
for k = 1, #unwanted, 2 do joins.look_later(unwanted[k]) end
flush_ready()
flush_tally(ttl)
flush_lines()
local left = redis.call('LLEN', 'pilotq:release')
if left > 0 then wake() end
return {math.floor(handled), left, unwanted}
