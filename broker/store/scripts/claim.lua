-- claim: waiting tasks are handed to nodes. Event claim.
--
-- Only heads are popped. An id whose hash is gone or not queued (canceled, deleted by a dashboard) is dropped, at most
-- DROP_LIMIT of them in a call. One whose record is damaged has failed. An array stays at the head until its last element is handed out. The inbox gets
-- messages.Run, or messages.Batch for tasks of one submission, and messages.Lease for a run of elements, field by
-- field.
-- ARGV: 1 queue id, 2 term, 3 now (unix s), 4 now (ISO), 5 show (ids of each list to return), 6 ttl of canceled records (s),
--       7 msgpack [[class, [[node:incarnation, slot, allocation, number of such targets (none: 1)], ...]], ...]; slot 0 = prefetched.
-- Returns for each class {number handed, length left, places of the first ids, elements left in the first one}: targets are
-- filled in order.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local now, now_iso, show, ttl = ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local inboxes, wip, answer = {}, {}, {}
local DROP_LIMIT, dropped, moment = 2000, 0, {now, now_iso, ttl}
local pack = cmsgpack.pack

-- As msgpack's bin 8 or 32: whatever is in it, or if there is none, the messages behind it can be read.
local function binary(text)
  local size = #text
  if size < 256 then return string.char(196, size) .. text end
  return string.char(198, math.floor(size / 16777216), math.floor(size / 65536) % 256, math.floor(size / 256) % 256, size % 256) .. text
end

-- The content key of what a task shares with others of its submission. A producer's job, which has none, says it itself.
local shared = {}

local function shared_by(f)
  if f.shared then return text_in('pq_shared', f.shared) end
  local key = f.submission or ''
  if not shared[key] then shared[key] = redis.call('HGET', submit_key(key), 'shared') or '' end
  return text_in('shared', shared[key])
end

-- Raises where the record is damaged, so it is made before anything is written.
local function run_message(target, class, id, execution, f)
  if not f.spec then damaged('pq_spec') end
  return string.char(220, 0, 18) .. pack('run', text_in('id', id), execution, target[2], target[3], class,
    text_in('pq_name', f.name), queued_in(f.queued, f.enqueued), tonumber(now), shared_by(f),
    f.array or '', f.index or -1, f.position or 0, number_in('pq_retries', f.retries, 0), text_in('pq_sub', f.submission))
    .. binary(f.spec) .. pack(number_in('pq_crashes', f.crashes, 0), text_in('pq_suspect_node', f.suspect_node))
end

local function inbox_of(address)
  local inbox = inboxes[address]
  if not inbox then inbox = {}; inboxes[address] = inbox end
  return inbox
end

-- Of a batch that is still open there are {what its tasks have in common, them}.
local function close_batch(inbox)
  local tasks = inbox.batch and inbox.batch[2]
  if tasks then
    inbox[#inbox + 1] = inbox.batch[1] .. string.char(220, math.floor(#tasks / 256), #tasks % 256) .. table.concat(tasks)
  end
  inbox.batch = nil
end

local function put(address, message)
  local inbox = inbox_of(address)
  close_batch(inbox)
  inbox[#inbox + 1] = message
end

-- Most tasks have nothing that those around them in the submission have not, but what stands in a line of messages.Batch.
local function is_usual(f)
  local retries = number_in('pq_retries', f.retries, 0)
  return f.spec and not f.array and (f.name or '') == '' and number_in('pq_crashes', f.crashes, 0) == 0
    and (f.suspect_node or '') == '' and retries % 1 == 0
end

-- The two parts of a message; raises where the record is damaged, so they are made before anything is written.
local function batch_message(target, class, id, execution, f)
  local head = '\152' .. pack('batch', class, queued_in(f.queued, f.enqueued), tonumber(now), shared_by(f),
    number_in('pq_retries', f.retries, 0), text_in('pq_sub', f.submission))
  return head, '\149' .. pack(text_in('id', id), execution, target[2], target[3]) .. binary(f.spec)
end

local function put_in_batch(address, head, task)
  local inbox = inbox_of(address)
  if not inbox.batch or inbox.batch[1] ~= head then
    close_batch(inbox)
    inbox.batch = {head, {}}
  end
  table.insert(inbox.batch[2], task)
end

-- The score of a lease in wip: which node has the task, and whether with a slot.
local function lease_of_target(target)
  local address = target[1]
  local number = inbox_of(address).holder or redis.call('HGET', 'pilotq:holders', address)
  if not number then
    number = string.format('%d', redis.call('HINCRBY', 'pilotq:holders', 'last', 1))
    redis.call('HSET', 'pilotq:holders', address, number, number, address)
  end
  inbox_of(address).holder = number
  return string.format('%d', -2 * number - (target[2] ~= 0 and 1 or 0))
end

local function hand(target, class, id, execution, message, task, score)
  if task then put_in_batch(target[1], message, task) else put(target[1], message) end
  local queue = queue_of(class)
  local members = wip[queue]
  if not members then members = {}; wip[queue] = members end
  members[#members + 1] = score
  members[#members + 1] = id .. ':' .. execution
end

-- A slot is noted only when there is one: what was prefetched has not run when its node dies. Of a task that was lost
-- before, the worker says when it begins (report_started.lua): only that is charged.
local function started(target, class, execution, crashes)
  local fields = {'status', 'started', 'origin', queue_of(class), 'pq_exec', execution, 'pq_node', target[1], 'worker_name',
    string.match(target[1], '^(.*):'), 'started_at', now_iso, 'pq_slot', '1'}
  return unpack(fields, 1, target[2] ~= 0 and tonumber(crashes or 0) == 0 and 14 or 12)
end

-- A byte of the outcomes that holds an element which has not ended (00).
local OPEN

local function open_byte()
  local full = {}
  for byte = 0, 255 do
    local pairs_of = {bit.rshift(byte, 6), bit.band(bit.rshift(byte, 4), 3), bit.band(bit.rshift(byte, 2), 3), bit.band(byte, 3)}
    if math.min(unpack(pairs_of)) > 0 then full[#full + 1] = string.gsub(string.char(byte), '%W', '%%%0') end
  end
  return '[^' .. table.concat(full) .. ']'
end

-- The first element from `position` on that has not ended; count when there is none.
local function next_open(id, position, count)
  while position < count do
    if position % 4 == 0 then
      OPEN = OPEN or open_byte()
      local chunk = redis.call('GETRANGE', outcomes_key(id), position / 4, position / 4 + 4095)
      local at = string.find(chunk, OPEN)
      position = position + 4 * (at and at - 1 or #chunk)
      if not at and #chunk == 4096 then position = position - 1 end -- look on from there
    end
    if redis.call('BITFIELD', outcomes_key(id), 'GET', 'u2', '#' .. string.format('%d', position))[1] == 0 then break end
    position = position + 1
  end
  return math.min(position, count)
end

local from -- the next target of the class that is to be filled

-- So many of the next targets are of one node, and so many of the next elements have not ended and have indices in even steps.
local function length_of_run(id, position, count, f, targets)
  local address, number = targets[from][1], 1
  local most = math.min(#targets - from + 1, select(3, index_at(f.array, position)))
  while number < most and targets[from + number][1] == address
    and (not f.gaps or next_open(id, position + number, count) == position + number) do
    number = number + 1
  end
  return number
end

-- Raises where the array's record is damaged, so it is made before anything is written.
local function lease_message(id, class, f, execution, position, number, targets)
  if not f.spec then damaged('pq_spec') end
  local slots = {}
  for k = from, from + number - 1 do
    if targets[k][2] ~= 0 then slots[#slots + 1] = pack(targets[k][2], targets[k][3]) end
  end
  for k, slot in ipairs(slots) do slots[k] = '\146' .. slot end
  local index, step = index_at(f.array, position)
  return string.char(220, 0, 16) .. pack('lease', text_in('id', id), execution, class, text_in('pq_name', f.name),
    queued_in(f.queued, f.enqueued), tonumber(now), shared_by(f), position, number, index, step,
    number_in('pq_retries', f.retries, 0), text_in('pq_sub', f.submission)) .. binary(f.spec)
    .. string.char(220, math.floor(#slots / 256), #slots % 256) .. table.concat(slots), #slots
end

-- As many elements of an array as there are targets, in leases; returns whether some are left.
local function claim_array(id, class, f, targets)
  local count = count_in(f.array)
  local execution, position = number_in('pq_first_attempt', f.first_attempt, 1), number_in('pq_next', f.next)
  class_in(class)
  while position < count and from <= #targets do
    -- With gaps: some have ended, canceled one by one or before a retry.
    if f.gaps then position = next_open(id, position, count) end
    if position == count then break end
    local number, address = length_of_run(id, position, count, f, targets), targets[from][1]
    local message, slots = lease_message(id, class, f, execution, position, number, targets)
    add_lease(id, position, number, execution, slots, now_iso, address)
    put(address, message)
    from, position = from + number, position + number
  end
  redis.call('HSET', job_key(id), 'pq_next', string.format('%d', position))
  if position == count then
    redis.call('HSET', job_key(id), 'status', 'started', 'origin', queue_of(class), 'started_at', now_iso)
    redis.call('ZADD', registry('wip', queue_of(class)), 'inf', id .. ':0')
  end
  return position < count
end

-- A job of RQ's producers: its `ttl` was for the time it waits. One with a rate limit keeps its rate-limit slot while it runs,
-- also after RQ's cancel or delete, only if RQ sees its execution.
local function begin_rq_job(id, execution, target)
  redis.call('PERSIST', job_key(id))
  if redis.call('HGET', job_key(id), 'rate_limit_key') then
    show_execution(id, execution, string.match(target[1], '^(.*):'), now, false, 86400)
  end
end

-- Executions of tasks, '<id>:<execution>', that are with a node by leases: an id may be in a list twice.
local taken = {}

local function read_taken(ids, queue)
  local members = {}
  for i, id in ipairs(ids) do members[i] = id .. ':1' end
  for i, score in ipairs(redis.call('ZMSCORE', registry('wip', queue), unpack(members))) do
    if tonumber(score or '0') < 0 then taken[members[i]] = true end
  end
end

-- One popped id: returns whether it must go back to the head of its list.
local function claim_one(id, class, targets)
  local v = redis.call('HMGET', job_key(id), 'status', 'pq_spec', 'pq_shared', 'pq_exec', 'pq_name', 'pq_retries',
    'pq_sub', 'pq_queued_at', 'pq_array', 'pq_array_of', 'pq_crashes', 'pq_suspect_node', 'enqueued_at')
  if v[1] ~= 'queued' and (STATUSES[v[1]] or not v[2] and not v[10]) then return false end
  if v[1] ~= 'queued' then damaged('status', v[1]) end
  -- A producer's job that took the id of a deleted task: it is routed from the list that it is in.
  if not v[2] and not v[10] and (v[7] or '') == '' then return false end
  if v[9] and (v[7] or '') == '' then damaged('pq_sub', v[7]) end
  local f = {spec = v[2], shared = v[3], name = v[5], retries = v[6], submission = v[7] or submission_of(id), queued = v[8], enqueued = v[13], array = v[9],
    crashes = v[11], suspect_node = v[12]}
  if v[9] then
    local more = redis.call('HMGET', job_key(id), 'data', 'description', 'created_at', 'pq_next', 'pq_has_gaps',
      'pq_first_attempt')
    f.data, f.description, f.created, f.next, f.class, f.gaps = more[1], more[2], more[3], more[4], class, more[5]
    f.first_attempt = more[6]
    return claim_array(id, class, f, targets)
  end
  if v[10] then
    -- An element that had been given back, or released by another array's element: its array knows the rest.
    local a = redis.call('HMGET', job_key(v[10]), 'pq_spec', 'pq_shared', 'pq_name', 'pq_sub', 'pq_queued_at', 'pq_class',
      'pq_cancel', 'pq_last_attempt', 'enqueued_at', 'pq_stopped')
    local position = number_in('pq_pos', redis.call('HGET', job_key(id), 'pq_pos'))
    if not a[1] and not a[6] then -- somebody deleted the array: what waits of it goes too
      count_end(redis.call('HGET', job_key(id), 'pq_sub'), 'canceled', 1)
      redis.call('DEL', job_key(id))
      return false
    end
    if (a[4] or '') == '' then damaged('pq_sub', a[4]) end
    if a[7] then return false end -- the array was canceled: release_dependents.lua ends what waits of it
    if a[10] then -- what waits of it was canceled, and this one waits again since
      end_unrun(id, 'canceled', now, now_iso, ttl)
      return false
    end
    -- One that was tried again with more has its own spec.
    f = {spec = v[2] or a[1], shared = a[2], name = a[3], submission = a[4], queued = a[5], enqueued = a[9], retries = v[6], array = v[10],
      position = position, index = tonumber(string.match(id, '_(%d+)$')), crashes = v[11], suspect_node = v[12],
      last_attempt = a[8]}
  end
  local target, execution = targets[from], number_in('pq_exec', v[4], 0) + 1
  local may_be_leased, member = not v[10] and f.submission ~= '', id .. ':' .. string.format('%d', execution)
  if may_be_leased and (taken[member] or execution > 1 and lease_score(queue_of(class), id, execution)) then return false end
  local last_attempt = v[10] and number_in('pq_last_attempt', f.last_attempt, 1)
  local message, task = (is_usual(f) and batch_message or run_message)(target, class, id, execution, f)
  -- Records of elements go: only so does a retry know which numbers of executions were used.
  if v[10] and execution > last_attempt then redis.call('HSET', job_key(v[10]), 'pq_last_attempt', execution) end
  local score = 'inf'
  if may_be_leased and number_in('pq_crashes', f.crashes, 0) == 0 then
    score = lease_of_target(target)
    taken[member] = true
  else
    redis.call('HSET', job_key(id), started(target, class, execution, f.crashes))
  end
  hand(target, class, id, execution, message, task, score)
  from = from + 1
  if f.submission == '' then begin_rq_job(id, execution, target) end
  return false
end

for number, group in ipairs(cmsgpack.unpack(ARGV[7])) do
  local class, targets = group[1], {}
  for _, target in ipairs(group[2]) do
    for _ = 1, target[4] or 1 do targets[#targets + 1] = target end
  end
  from = 1
  local list = list_key(class)
  set_aside(class)
  while from <= #targets and dropped < DROP_LIMIT do
    local ids = redis.call('LPOP', list, math.min(#targets - from + 1, PIECE))
    if not ids then break end
    read_taken(ids, queue_of(class))
    for i, id in ipairs(ids) do
      -- An array in front of it may have taken all targets.
      local before, again = from, from > #targets
      if not again then again = select(2, guarded(moment, id, claim_one, id, class, targets)) end
      if from == before and not again then dropped = dropped + 1 end
      if again then
        -- Slots are full: the array and all that was popped behind it go back in their order.
        local back = {}
        for k = #ids, i, -1 do back[#back + 1] = ids[k] end
        push('LPUSH', list, back)
        break
      end
    end
  end
  local ids = redis.call('LRANGE', list, 0, show - 1)
  local left = ids[1] and elements_left(ids[1]) or 0
  answer[number] = {from - 1, #ids < show and #ids or redis.call('LLEN', list), places(ids), left}
end
for node, items in pairs(inboxes) do
  close_batch(items)
  send(node, #items, table.concat(items))
end
for queue, members in pairs(wip) do push('ZADD', registry('wip', queue), members) end
flush_tally(ttl)
flush_lines()
return answer
