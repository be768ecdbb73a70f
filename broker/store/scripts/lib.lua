-- At the top of the library that the server keeps (broker/store/library.py), and run when it is loaded: what all scripts share. Words
-- of design: docs/design/0004-data-in-redis.md.
--
-- Keys are built here and not passed as keys: one private server, no cluster; who a task's dependents or its array are
-- is only known after reading. All checks come before the first write: a script is not rolled back.
-- ARGV[1] is always the id of the queue; scripts of the dispatcher get its term in ARGV[2].
-- Lists of ours are cut into pieces for unpack(): Lua's stack holds fewer than 8,000 values.

-- What a call was given, what it has read, and what it will write at its end: of one call, nothing of it is left for the next one.
local ARGV, queues, texts, offered, ready, tally, completed, lines, endings, promoted
local parents, elements, counts -- of lib_commit.lua

local function begin(argv)
  ARGV, queues, texts, offered, ready, tally, completed, lines, promoted = argv, {}, {}, {}, {}, {}, {}, {}, 0
  endings = {['finished\n\n1'] = '\192'}
  parents, elements, counts = {}, {}, {}
end

-- A script becomes a function of the library.
local function define(name, flags, run)
  redis.register_function{function_name = name, flags = flags, callback = function(_, argv)
    begin(argv)
    return run()
  end}
end

local PIECE = 4000

local function job_key(id) return 'rq:job:' .. id end
local function list_key(class) return 'rq:queue:' .. class end
local function registry(kind, queue) return 'rq:' .. kind .. ':' .. queue end
local function inbox_key(node) return 'pilotq:inbox:' .. node end
local function submit_key(key) return 'pilotq:submit:' .. key end
local function dependents_key(id) return 'pilotq:dependents:' .. id end
local function elementwise_key(id) return 'pilotq:elementwise:' .. id end
local function outcomes_key(id) return 'pilotq:outcomes:' .. id end
local function completed_key(name) return 'pilotq:completed:' .. name end
local function values_key(id) return 'pilotq:values:' .. id end
-- Of a bundle of functions: a sorted set of packed {first position, results of that and those behind it}, by that position.
local function returned_key(id) return 'pilotq:returned:' .. id end
local function children_key(id) return 'pilotq:children:' .. id end

-- The user's queue of a class list: default.p10.2c -> default. RQ's producers may have points in the names of theirs.
local function queue_of(class)
  local queue = queues[class]
  if not queue then
    queue = string.match(class, '^(.*)%.p%-?%d+%.[^.]*$') or class
    queues[class] = queue
  end
  return queue
end

-- -- fields of records, which others can write to: an error names the one that is damaged, and `guarded` catches it ----------

local EXACT = 2 ^ 53 -- larger numbers are not exact in Lua

local function damaged(field, value)
  local what = value and 'is damaged: ' .. string.format('%q', string.sub(value, 1, 40)) or 'is missing'
  error(string.format('its field %s %s', field, what), 0)
end

local function number_in(field, value, default)
  local number = tonumber(value or default)
  if not number or number ~= number or math.abs(number) > EXACT then damaged(field, value) end
  return number
end

local STATUSES = {queued = true, deferred = true, scheduled = true, rate_limited = true, ready_to_enqueue = true,
  started = true, finished = true, failed = true, stopped = true, canceled = true}

local ENDED = {finished = true, failed = true, stopped = true, canceled = true}

-- A dependency as text is the id of a parent and, behind a colon, the letters of those of its ends that release what waits; without
-- them only 'k' does. Behind a task that joins stands 'j': it waits for the end of this child, see lib_joins.lua.
local END_LETTERS = {finished = 'k', failed = 'f', stopped = 'o', canceled = 'o'}

local function parent_of(text)
  if not string.find(text, ':', 1, true) then return text, 'k' end
  local parent, ends = string.match(text, '^(.*):([kfoj]+)$')
  return parent or text, ends or 'k'
end

-- The reverse.
local function dependency_on(parent, ends) return ends == 'k' and parent or parent .. ':' .. ends end

-- How many elements an array has; nil where the text is none. An array of one range is 'start:step:count'. Of several it is
-- 'first:0:count', and for each range ' position start step', in numbers of one width (broker/tasks/array_indices.py).
local function count_of(text)
  local start, step, count, rest = string.match(text or '', '^(%d+):(%d+):(%d+)()')
  start, step, count = tonumber(start), tonumber(step), tonumber(count)
  if not count or count < 1 or start + step * (count - 1) >= EXACT then return nil end
  if step > 0 and rest > #text or step == 0 and string.match(text, '^ %d+ %d+ %d+', rest) then return count end
end

local function count_in(text)
  return count_of(text) or damaged('pq_array', text)
end

-- Of a range of an array of several: position of its first element, its start, its step; nil when there is none.
local function range_at(text, head, width, number)
  local from = head + number * 3 * (width + 1)
  local function field(place)
    local at = from + place * (width + 1)
    return tonumber(string.sub(text, at + 2, at + 1 + width))
  end
  local position, start, step = field(0), field(1), field(2)
  if position and start and step then return position, start, step end
end

-- The last range of which the position (`by` 1) or the start (2) is not above `value`: its position, start, step and length.
local function range_of(text, by, value)
  local count, rest = string.match(text, '^%d+:0:(%d+)()')
  local width = #string.match(text, '^ (%d+)', rest)
  local head, low, high = rest - 1, 0, (#text - rest + 1) / 3 / (width + 1) - 1
  if high % 1 ~= 0 or high < 0 then damaged('pq_array', text) end
  while low < high do
    local middle = math.ceil((low + high) / 2)
    if (select(by, range_at(text, head, width, middle)) or damaged('pq_array', text)) <= value then low = middle else high = middle - 1 end
  end
  local position, start, step = range_at(text, head, width, low)
  local behind = range_at(text, head, width, low + 1) or tonumber(count)
  if not position or step < 1 or behind <= position then damaged('pq_array', text) end
  return position, start, step, behind - position
end

-- The index of an element by its position, in an array whose text `count_of` knows. Behind it the step to the next index, and
-- how many elements follow each other in that step from here on.
local function index_at(text, position)
  local start, step, count = string.match(text, '^(%d+):([1-9]%d*):(%d+)$')
  local first = 0
  if not start then first, start, step, count = range_of(text, 1, position) end
  return start + (position - first) * step, tonumber(step), count - (position - first)
end

-- The position of an element by its index, as it stands in its id; nil of what is no element.
local function position_of(index, text)
  local number = tonumber(index or '')
  if not number or number >= EXACT or string.format('%d', number) ~= index then return nil end
  local start, step, count = string.match(text, '^(%d+):([1-9]%d*):(%d+)$')
  local first = 0
  if not start then first, start, step, count = range_of(text, 2, number) end
  local position = (number - start) / step
  if position >= 0 and position < tonumber(count) and position % 1 == 0 then return first + position end
end

-- Messages to workers are decoded as a whole: one name that is not UTF-8 would cost all tasks in it.
local function text_in(field, value)
  if not value or not string.find(value, '[\128-\255]') then return value or '' end
  local rest = string.gsub(value, '[\194-\223][\128-\191]', ' ')
  rest = string.gsub(rest, '[\224-\239][\128-\191][\128-\191]', ' ')
  rest = string.gsub(rest, '[\240-\244][\128-\191][\128-\191][\128-\191]', ' ')
  local wrong = string.find(rest, '[\128-\255]') or string.find(value, '\224[\128-\159]')
    or string.find(value, '\237[\160-\191]') or string.find(value, '\240[\128-\143]') or string.find(value, '\244[\144-\191]')
  if wrong then damaged(field, value) end
  return value
end

local function class_in(value)
  if not string.match(text_in('pq_class', value), '%.p%-?%d+%.[^.]+$') then damaged('pq_class', value) end
  return value
end

local function printable(value)
  if not value then return '' end
  return pcall(text_in, '', value) and value or (string.gsub(value, '[\128-\255]', '?'))
end

-- Unix seconds of a time in RQ's form; nil of what is none.
local function seconds_of(iso)
  local y, m, d, hours, minutes, seconds = string.match(iso or '', '^(%d%d%d%d)-(%d%d)-(%d%d)T(%d%d):(%d%d):(%d%d%.?%d*)Z$')
  if not y then return end
  if tonumber(m) < 3 then y, m = y - 1, m + 12 end -- days are counted from a first of March
  local days = 365 * y + math.floor(y / 4) - math.floor(y / 100) + math.floor(y / 400) + math.floor((153 * m - 457) / 5) + d - 719469
  return days * 86400 + hours * 3600 + minutes * 60 + seconds
end

-- When a task was submitted, or requeued. Of jobs of RQ's producers a field of its own says it.
local function queued_in(value, enqueued_at)
  return value and number_in('pq_queued_at', value) or seconds_of(enqueued_at) or 0
end

-- The indices of an array; its text may be long, and is read once a call.
local function text_of(array)
  local text = texts[array] or redis.pcall('HGET', job_key(array), 'pq_array')
  if type(text) ~= 'string' then return nil end
  texts[array] = text
  return text
end

-- True unless the server lost its state; then the script must return queue_id_error().
local function queue_id_ok() return redis.call('GET', 'pilotq:queue-id') == ARGV[1] end
local function term_ok() return redis.call('GET', 'pilotq:term') == ARGV[2] end
local function queue_id_error() return redis.error_reply('QUEUE_ID this server does not hold the queue you mean') end
local function term_error() return redis.error_reply('TERM another dispatcher has taken over') end

local function push(command, key, items)
  for first = 1, #items, PIECE do
    redis.call(command, key, unpack(items, first, math.min(first + PIECE - 1, #items)))
  end
end

-- What somebody else has put in the place of a class list is set aside; the dispatcher finds the tasks that were in the list.
local SET_ASIDE_TTL = 604800

local function set_aside(class)
  local list = list_key(class)
  local kind = redis.call('TYPE', list).ok
  if kind == 'list' or kind == 'none' then return end
  redis.call('RENAME', list, 'pilotq:set-aside:' .. class)
  redis.call('EXPIRE', 'pilotq:set-aside:' .. class, SET_ASIDE_TTL)
  redis.call('HSET', 'pilotq:damaged-classes', class, kind)
  redis.call('EXPIRE', 'pilotq:damaged-classes', SET_ASIDE_TTL)
end

-- A class list gets something, or has got it: RQ's tools see the list (of very many not all), and the dispatcher reads it.
local QUEUES_SHOWN = 1000
local function offer(class)
  if offered[class] then return end
  offered[class] = true
  set_aside(class)
  if redis.call('HGET', 'pilotq:classes', class) ~= '' then redis.call('HSET', 'pilotq:classes', class, '') end
  redis.call('SADD', 'pilotq:classes:changed', class)
  if redis.call('SCARD', 'rq:queues') < QUEUES_SHOWN then redis.call('SADD', 'rq:queues', list_key(class)) end
end

-- Tasks that get into their lists, in this order; `flush_ready` writes the lists.
local function line_up(id, class)
  ready[class] = ready[class] or {}
  table.insert(ready[class], id)
end

local function queue_up(id, class)
  redis.call('HSET', job_key(id), 'status', 'queued', 'origin', class)
  line_up(id, class)
  return 'queued'
end

local function flush_ready()
  for class, ids in pairs(ready) do
    redis.call('SADD', 'rq:queues', list_key(queue_of(class)))
    offer(class)
    push('RPUSH', list_key(class), ids)
  end
end

-- A message to a worker: its inbox is a stream, each entry holds a packed list of messages.
local function send(node, number, packed)
  local head = string.char(220, math.floor(number / 256), number % 256)
  redis.call('XADD', inbox_key(node), '*', 'm', head .. packed)
end

-- RQ's sets of workers: of all, and of the queue that each names (`rq info` looks there, by queue).
local function enlist(command, worker)
  redis.call(command, 'rq:workers', worker)
  redis.call(command, 'rq:workers:default', worker)
end

local function wake()
  if redis.call('LLEN', 'pilotq:wakeup') == 0 then redis.call('RPUSH', 'pilotq:wakeup', '1') end
end

-- The message of a worker's call to the dispatcher, once for each number of call: a call that is repeated because its reply
-- was lost must not free a slot twice. Without a record (it expired) nothing is noted: that would make a record again.
local function deliver(node, call, message, finished, failed)
  local worker = 'rq:worker:' .. string.match(node, '^(.*):')
  local v = redis.call('HMGET', worker, 'pq_incarnation', 'pq_call:' .. node)
  if tonumber(v[2] or 0) >= tonumber(call) then return end
  redis.call('RPUSH', 'pilotq:events', message)
  if not v[1] then return end
  redis.call('HSET', worker, 'pq_call:' .. node, call)
  if finished > 0 then redis.call('HINCRBY', worker, 'successful_job_count', finished) end
  if failed > 0 then redis.call('HINCRBY', worker, 'failed_job_count', failed) end
end

-- What ended in this call, by submission (tally), and what executors are told of it (completed); written once by flush_tally.
local UNREAD_TTL = 86400 -- of what an executor is told: it may be stopped for a day

-- An executor submits with keys '@<its name, 12 hex digits>.<number>'. It reads from a stream how each of its tasks has
-- ended, with its result, and removes what it has read: that result is kept nowhere else.
local EXECUTOR = '^@(%x%x%x%x%x%x%x%x%x%x%x%x)%.'
local function executor_of(submission) return submission and string.match(submission, EXECUTOR) end

-- Without a status: `id` is a run of tasks of a bundle that have finished, packed: the bundle, the first position, and their results.
local function notify_executor(submission, id, status, reason, text)
  local name = executor_of(submission)
  if not name then return end
  completed[name] = completed[name] or {ends = {}, runs = {}}
  if status then table.insert(completed[name].ends, {id, status, reason, text}) else table.insert(completed[name].runs, id) end
end

local function count_end(submission, status, number)
  local field = status == 'finished' and 'finished' or (status == 'canceled' and 'canceled' or 'failed')
  local key = (submission or '') .. '\n' .. field
  tally[key] = (tally[key] or 0) + number
end

-- Counts go on though the number, or the whole record, is damaged; returns false then.
local function count_up(key, field, number)
  local now = redis.pcall('HINCRBY', key, field, number)
  return type(now) == 'number' and now
end

-- What the tasks of a submission share goes some time after the last submission that uses it.
local function unshare(key, ttl)
  local references = key and count_up('pilotq:shared-refs', key, -1)
  if references and references <= 0 then
    redis.call('HDEL', 'pilotq:shared-refs', key)
    redis.call('EXPIRE', 'pilotq:shared:' .. key, ttl)
  end
end

-- The submission, not ended yet, of a task or element whose record is gone: its number tells.
local function submission_of(id)
  local number = string.match(id, '^([0-9a-v]+)_?%d*$')
  number = number and #number <= 10 and tonumber(number, 32)
  if not number then return '' end
  local key = redis.call('ZREVRANGEBYSCORE', 'pilotq:submissions', number, '-inf', 'LIMIT', 0, 1)[1]
  local v = key and redis.call('HMGET', submit_key(key), 'first', 'records') or {}
  return v[1] and number < v[1] + v[2] and key or ''
end

local function flush_tally(ttl)
  for key, number in pairs(tally) do
    local submission, field = string.match(key, '^(.*)\n(.*)$')
    count_up('pilotq:counts', field, number)
    if submission ~= '' then
      count_up(submit_key(submission), field, number)
      local left = count_up(submit_key(submission), 'left', -number)
      if left and left <= 0 then
        redis.call('EXPIRE', submit_key(submission), ttl)
        redis.call('ZREM', 'pilotq:submissions', submission)
      end
      if left == 0 then unshare(redis.call('HGET', submit_key(submission), 'shared'), ttl) end
    end
  end
  for name, told in pairs(completed) do
    local ends, runs = told.ends, told.runs
    if #ends > 0 then redis.call('XADD', completed_key(name), '*', 'ends', cmsgpack.pack(ends)) end
    if #runs > 0 then
      local head = string.char(220, math.floor(#runs / 256), #runs % 256)
      redis.call('XADD', completed_key(name), '*', 'runs', head .. table.concat(runs))
    end
    redis.call('EXPIRE', completed_key(name), UNREAD_TTL)
  end
  tally, completed = {}, {}
end

-- Where these ids stand in the order of all tasks, as ids of ours: one of a producer says nothing about that.
local function places(ids)
  for i, id in ipairs(ids) do
    local number = string.match(id, '^([0-9a-v]+)_?%d*$')
    if not number or #number > 10 then
      local place = redis.pcall('HGET', job_key(id), 'pq_seq')
      ids[i] = type(place) == 'string' and string.match(place, '^[0-9a-v]+$') or '0'
    end
  end
  return ids
end

-- How many elements of an array were not handed out; 0 of what is none.
local function elements_left(id)
  local f = redis.pcall('HMGET', job_key(id), 'pq_array', 'pq_next')
  local count = count_of(f[1])
  return count and math.max(count - (tonumber(f[2] or '') or count), 0) or 0
end

-- Lines for the journal; one stream entry holds all lines of one call: msgpack [[line, changes], ...]. A line is a map of fields, or a
-- Line of journal_runs.py.
local function journal(line, changes)
  lines[#lines + 1] = '\146' .. line .. (type(changes) == 'string' and changes or cmsgpack.pack(changes))
end

-- Packed {status, reason, final} of an ended execution, nil of one that finished; most executions of a call end alike. One that
-- has waited for others was released at some time.
local function packed_ending(status, reason, final, released)
  released = tonumber(released or '')
  if released then return cmsgpack.pack({status = status, reason = reason, final = final, released = released}) end
  local key = status .. '\n' .. reason .. (final and '\n1' or '')
  local packed = endings[key]
  if not packed then
    packed = cmsgpack.pack({status = status, reason = reason, final = final})
    endings[key] = packed
  end
  return packed
end

local function flush_lines()
  for first = 1, #lines, PIECE do
    local last = math.min(first + PIECE - 1, #lines)
    local number = last - first + 1
    local head = string.char(220, math.floor(number / 256), number % 256)
    redis.call('XADD', 'pilotq:journal', '*', 'e', head .. table.concat(lines, '', first, last))
  end
  lines = {}
end

-- Those that wait for a whole task are handled by release_dependents.lua, in slices. How it ended stands in the entry: its
-- record may be gone by then.
local function request_release(id, dependents, status)
  if not dependents then return end
  redis.call('RPUSH', 'pilotq:release', END_LETTERS[status] .. ':' .. id)
end

-- What somebody waits for: the reconciler looks whether it is still there.
local function track_parent(parent) redis.call('SADD', 'pilotq:parents', parent) end

-- Tasks that wait for others, as ours know it, have this added to the time in their score; RQ's producers have not.
local ADOPTED = 1e12

-- Defined in lib_rq.lua, in lib_leases.lua, and in lib_joins.lua.
local rq_ended, rq_count_in
local drop_leases, number_leased
local end_waiting
local joins = {}

-- Set elements first..last (positions) of an array to a two-bit outcome that no element there has yet.
local function set_outcomes(array, first, last, outcome)
  local position = first
  while position <= last and position % 4 ~= 0 do
    redis.call('BITFIELD', outcomes_key(array), 'SET', 'u2', '#' .. position, outcome)
    position = position + 1
  end
  local whole = math.floor((last - position + 1) / 4)
  if whole > 0 then
    redis.call('SETRANGE', outcomes_key(array), position / 4, string.rep(string.char(outcome * 85), whole))
    position = position + whole * 4
  end
  while position <= last do
    redis.call('BITFIELD', outcomes_key(array), 'SET', 'u2', '#' .. position, outcome)
    position = position + 1
  end
end

local function array_keys(array)
  return {job_key(array), outcomes_key(array), values_key(array), returned_key(array), elementwise_key(array)}
end

-- The record of an array that has ended goes after so many seconds.
local function expire_array(array, ttl)
  if not ENDED[redis.call('HGET', job_key(array), 'status')] then return end
  for _, key in ipairs(array_keys(array)) do redis.call('EXPIRE', key, ttl) end
end

-- These elements of an array that may have ended are to be looked at for those who wait. Its record stays until then, however
-- long that takes.
local function look_at(array, first, last)
  redis.call('RPUSH', 'pilotq:release', string.format('e:%s:%d:%d', array, first, last))
  local ttl = redis.call('TTL', job_key(array))
  if ttl < 0 then return end
  for _, key in ipairs(array_keys(array)) do redis.call('PERSIST', key) end
  redis.call('RPUSH', 'pilotq:release', string.format('x:%s:%d', array, ttl))
end

-- So many elements of an array have failed, and some are left: when these are more than may fail, what waits of it is canceled.
local function limit_failures(array, failures, now, now_iso, ttl)
  local most = tonumber(redis.call('HGET', job_key(array), 'pq_failures_max') or '')
  if most and failures > most then end_waiting(array, 'failures', now, now_iso, ttl) end
end

-- Elements of an array have ended: `number` of them, `bad` of these not finished, `failed` of these failed. Ends the array with
-- its last one. An array whose record somebody deleted has nothing to count on: an HINCRBY would make a record again.
local function array_ended(array, number, bad, now, now_iso, ttl_finished, ttl_failed, failed)
  if redis.call('EXISTS', job_key(array)) == 0 then return end
  if bad > 0 then redis.call('HINCRBY', job_key(array), 'pq_unfinished', bad) end
  local failures = (failed or 0) > 0 and redis.call('HINCRBY', job_key(array), 'pq_failures', failed)
  if redis.call('HINCRBY', job_key(array), 'pq_left', -number) > 0 then
    if failures then limit_failures(array, failures, now, now_iso, ttl_failed) end
    return
  end
  local f = redis.call('HMGET', job_key(array), 'pq_unfinished', 'pq_cancel', 'pq_name', 'pq_sub', 'pq_queued_at',
    'pq_has_dependents', 'pq_class', 'status', 'pq_array', 'pq_reason', 'pq_elementwise', 'description', 'enqueued_at',
    'pq_stopped', 'pq_bundle', 'pq_failures', 'pq_released')
  if f[10] then return end
  count_in(f[9])
  class_in(f[7])
  local outcomes = redis.call('GET', outcomes_key(array)) or ''
  local status, reason = 'finished', ''
  -- Where all of its elements finished all the same there was nothing to cancel, but for RQ's tools, which have said so.
  if f[2] and (tonumber(f[1] or 0) > 0 or f[8] == 'canceled') then
    status, reason = 'canceled', f[2]
  elseif f[14] and tonumber(f[1] or 0) > 0 then
    -- Too many failures may have been those of others.
    status, reason = f[14] == 'failures' and tonumber(f[16] or 0) > 0 and 'failed' or 'canceled', f[14]
  elseif f[8] == 'deferred' then
    status, reason = 'canceled', 'dependency' -- none of its elements ever ran
  elseif tonumber(f[1] or 0) > 0 then
    status, reason = 'failed', 'elements'
  end
  local queue = queue_of(f[7])
  local ttl = status == 'finished' and ttl_finished or ttl_failed
  redis.call('HSET', job_key(array), 'status', status, 'pq_reason', reason, 'ended_at', now_iso, 'origin', queue)
  redis.call('ZREM', registry('wip', queue), array .. ':0')
  redis.call('ZREM', registry('deferred', queue), array)
  redis.call('ZADD', registry(status, queue), status == 'canceled' and now or now + ttl, array)
  if f[11] then -- behind the entries of its elements
    redis.call('RPUSH', 'pilotq:release', string.format('x:%s:%d', array, ttl))
  else
    expire_array(array, ttl)
  end
  redis.call('DEL', elementwise_key(array) .. ':seen')
  drop_leases(array)
  redis.call('SREM', 'pilotq:parents', array)
  journal(cmsgpack.pack({id = array, name = printable(f[3]), submission = printable(f[4]), command = printable(f[12]),
      bundle = f[15] and true or nil}),
    {status = status, reason = reason, final = true, ended = tonumber(now), queued = tonumber(f[5] or '') or seconds_of(f[13]) or tonumber(now),
      outcomes = outcomes, array = f[9], released = tonumber(f[17] or '')})
  request_release(array, f[6], status)
end

local end_elements

do

-- Of the elements first..last of an array `number` have been canceled.
local function count_canceled(array, submission, first, last, number, now, now_iso, ttl)
  count_end(submission, 'canceled', number)
  if redis.call('HGET', job_key(array), 'pq_elementwise') then
    redis.call('RPUSH', 'pilotq:release', string.format('e:%s:%d:%d', array, first, last))
  end
  array_ended(array, number, number, now, now_iso, ttl, ttl)
end

-- Elements first..last of an array, of which none runs or has ended, end as canceled.
local function end_run(array, submission, first, last, now, now_iso, ttl)
  set_outcomes(array, first, last, 3)
  count_canceled(array, submission, first, last, last - first + 1, now, now_iso, ttl)
end

-- Each byte of outcomes in which an element has not ended, and the byte with these canceled.
local with_open_canceled

local function make_byte_table()
  with_open_canceled = {}
  for byte = 0, 255 do
    local ended = byte
    for shift = 0, 6, 2 do
      if bit.band(bit.rshift(byte, shift), 3) == 0 then ended = bit.bor(ended, bit.lshift(3, shift)) end
    end
    if ended ~= byte then with_open_canceled[string.char(byte)] = string.char(ended) end
  end
end

-- The whole bytes first..last of the outcomes: what has not ended there is canceled. Returns how many elements: each sets two bits.
local function cancel_bytes(array, first, last)
  if not with_open_canceled then make_byte_table() end
  local key = outcomes_key(array)
  local outcomes, before = redis.call('GETRANGE', key, first, last), redis.call('BITCOUNT', key, first, last)
  outcomes = outcomes .. string.rep('\0', last - first + 1 - #outcomes)
  redis.call('SETRANGE', key, first, (string.gsub(outcomes, '.', with_open_canceled)))
  return (redis.call('BITCOUNT', key, first, last) - before) / 2
end

local function cancel_position(array, position)
  local at = '#' .. string.format('%d', position)
  if redis.call('BITFIELD', outcomes_key(array), 'GET', 'u2', at)[1] ~= 0 then return 0 end
  redis.call('BITFIELD', outcomes_key(array), 'SET', 'u2', at, 3)
  return 1
end

-- Elements first..last of an array, of which none runs, end as canceled. Where some may have been canceled one by one before
-- (pq_has_gaps), these have ended, and are passed over.
end_elements = function(array, submission, first, last, now, now_iso, ttl)
  if executor_of(submission) then -- the calls of one are at most some thousands
    for position = first, last do
      if redis.call('BITFIELD', outcomes_key(array), 'GET', 'u2', '#' .. string.format('%d', position))[1] == 0 then
        notify_executor(submission, array .. '_' .. string.format('%d', position), 'canceled', 'canceled', '')
      end
    end
  end
  if first == last or not redis.call('HGET', job_key(array), 'pq_has_gaps') then
    return end_run(array, submission, first, last, now, now_iso, ttl)
  end
  local number, position = 0, first
  while position <= last do
    local whole = math.floor((last + 1) / 4) - 1 -- the last byte that ends within
    if position % 4 == 0 and position / 4 <= whole then
      number = number + cancel_bytes(array, position / 4, whole)
      position = 4 * (whole + 1)
    else
      number = number + cancel_position(array, position)
      position = position + 1
    end
  end
  if number > 0 then count_canceled(array, submission, first, last, number, now, now_iso, ttl) end
end

end

-- A task or element of which nothing runs ends: canceled while it waited or was on its way back, or omitted. One that has children
-- is 'stopping' first; with `goes_on` they are not canceled.
local function end_unrun(id, reason, now, now_iso, ttl, goes_on)
  local v = redis.call('HMGET', job_key(id), 'pq_class', 'origin', 'pq_name', 'pq_sub', 'pq_queued_at', 'pq_has_dependents',
    'pq_array_of', 'pq_pos', 'description', 'enqueued_at', 'pq_join')
  -- A producer's job that was not routed yet has no class.
  local queue = v[1] and queue_of(v[1]) or v[2] or ''
  redis.call('ZREM', registry('scheduled', queue), id)
  if v[11] and joins.begin(id, queue, 'canceled', reason, '', now, goes_on) then return 'stopping' end
  if v[7] then
    local position = number_in('pq_pos', v[8])
    redis.call('DEL', job_key(id))
    end_elements(v[7], v[4], position, position, now, now_iso, ttl)
    return
  end
  if (v[4] or '') == '' then
    rq_count_in(id, now)
    rq_ended(id, queue, now, now_iso)
  end
  redis.call('HSET', job_key(id), 'status', 'canceled', 'origin', queue, 'pq_reason', reason, 'ended_at', now_iso)
  -- RQ keeps a canceled job as long as it would have waited, or for ever.
  if (v[4] or '') ~= '' then redis.call('EXPIRE', job_key(id), ttl) end
  redis.call('ZREM', registry('deferred', queue), id)
  redis.call('ZADD', registry('canceled', queue), now, id)
  count_end(v[4], 'canceled', 1)
  journal(cmsgpack.pack({id = id, name = printable(v[3]), submission = printable(v[4]), command = printable(v[9])}),
    {status = 'canceled', reason = reason, final = true, ended = tonumber(now), queued = tonumber(v[5] or '') or seconds_of(v[10]) or tonumber(now)})
  request_release(id, v[6], 'canceled')
  notify_executor(v[4], id, 'canceled', reason, '')
end

-- A task or array is not run because a task it depends on did not end as required.
local function omit(id, now, now_iso, ttl)
  local v = redis.call('HMGET', job_key(id), 'pq_array', 'pq_sub')
  if not v[1] then return end_unrun(id, 'dependency', now, now_iso, ttl) end
  end_elements(id, v[2], 0, count_in(v[1]) - 1, now, now_iso, ttl)
end

-- -- damaged records --------------------------------------------------------------------------------------------------------

-- An element whose record or whose array's is damaged: it has failed, if its array can still count that.
local function end_damaged_element(id, array, now, now_iso, ttl)
  local a = redis.call('HMGET', job_key(array), 'pq_array', 'pq_elementwise')
  local position = count_of(a[1]) and position_of(string.match(id, '_(%d+)$'), a[1])
  if not position then return false end
  set_outcomes(array, position, position, 2)
  if a[2] then redis.call('RPUSH', 'pilotq:release', string.format('e:%s:%d:%d', array, position, position)) end
  array_ended(array, 1, 1, now, now_iso, ttl, ttl, 1)
  return true
end

-- What begins so in a queue's wip and is no lease: that has a score below 0. An order by name there is none.
local function in_wip(queue, prefix)
  local found = {}
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', registry('wip', queue), '+inf', '+inf')) do
    if string.sub(member, 1, #prefix) == prefix then found[#found + 1] = member end
  end
  return found
end

-- A task, array or element whose record cannot be used has failed; the journal says why.
local function end_damaged(id, why, now, now_iso, ttl)
  local v = redis.pcall('HMGET', job_key(id), 'status', 'pq_sub', 'pq_class', 'origin', 'pq_name', 'pq_queued_at',
    'pq_has_dependents', 'pq_exec', 'pq_array_of', 'pq_array', 'pq_left', 'enqueued_at')
  -- A stranger's key, a deleted record, one that has ended; a producer's job that took the id of a deleted task.
  if v.err or ENDED[v[1]] then return end
  if not v[3] and not (v[1] and v[2]) then return end
  local class, submission, array = pcall(class_in, v[3]) and v[3] or v[4] or '', v[2], v[9]
  if not submission or submission ~= '' and redis.call('EXISTS', submit_key(submission)) == 0 then submission = submission_of(id) end
  local queue, number = queue_of(class), 1
  if v[10] then -- those of its elements that run are counted when they end
    local open = tonumber(v[11] or '') or count_of(v[10]) or 1
    local running = #in_wip(queue, id .. '_') + number_leased(id)
    number = math.max(open - running, 0)
    for _, key in ipairs({outcomes_key(id), values_key(id), returned_key(id)}) do redis.call('EXPIRE', key, ttl) end
  end
  redis.call('ZREM', registry('wip', queue), id .. ':' .. (v[10] and '0' or v[8] or ''))
  if not v[10] then redis.call('ZREM', registry('wip', queue), id .. ':' .. string.format('%d', (tonumber(v[8] or '') or 0) + 1)) end
  redis.call('ZREM', registry('deferred', queue), id)
  redis.call('ZREM', registry('scheduled', queue), id)
  redis.call('HSET', job_key(id), 'status', 'failed', 'origin', queue, 'pq_reason', 'refused', 'ended_at', now_iso)
  for _, key in ipairs({job_key(id), children_key(id)}) do redis.call('EXPIRE', key, ttl) end
  redis.call('ZADD', registry('failed', queue), now + ttl, id)
  if number > 0 then count_end(submission, 'failed', number) end
  local text = 'its record on the server is damaged: ' .. why
  local line = {id = printable(id), message = text, name = printable(v[5]), submission = printable(submission), array = array or nil}
  if array and redis.pcall('HEXISTS', job_key(array), 'pq_bundle') == 0 then line.index = tonumber(string.match(id, '_(%d+)$')) end
  local queued = tonumber(v[6] or '') or seconds_of(v[12])
  journal(cmsgpack.pack(line), {status = 'failed', reason = 'refused', final = true, ended = tonumber(now),
    queued = queued and queued < EXACT and queued or tonumber(now)})
  request_release(id, v[7], 'failed')
  notify_executor(submission, id, 'failed', 'refused', '')
  if array and not select(2, pcall(end_damaged_element, id, array, now, now_iso, ttl)) then
    end_damaged(array, why, now, now_iso, ttl)
  end
end

-- One step for one task of the call. What is damaged of it ends that task alone (with `moment`: {now, now_iso, ttl}): nothing of
-- the others is lost. Returns whether it went through, and what the step returns.
local function guarded(moment, id, step, ...)
  local done, a, b = pcall(step, ...)
  if done then return true, a, b end
  local why = type(a) == 'table' and a.err or tostring(a)
  -- What says that the server can write nothing is no damage.
  local code = string.match(why, '^%-?(%u+) ')
  if code and code ~= 'ERR' and code ~= 'WRONGTYPE' then error(a, 0) end
  why = printable((string.gsub(string.gsub(why, '^user_%a+:%d+: ', ''), ' script: .*$', '')))
  if moment then pcall(end_damaged, id, why, unpack(moment, 1, 3)) end
  return false
end

-- The record of one element of an array, made when the element gets a life of its own.
local function make_element(array, position, f, extra)
  local index = f.index or index_at(f.array, position)
  local id = array .. '_' .. string.format('%d', index)
  local n, created = #extra, f.created or ''
  for i, value in ipairs({'pq_class', f.class, 'pq_array_of', array, 'pq_pos', string.format('%d', position), 'pq_sub',
    f.submission or '', 'data', f.data or '', 'description', f.description or '', 'created_at', created, 'enqueued_at', created}) do
    extra[n + i] = value
  end
  redis.call('HSET', job_key(id), unpack(extra))
  return id, index
end
