-- Behind lib_leases.lua in the library: what RQ 3 owes to the jobs of its own producers (their pq_sub is empty), and
-- what its tools show of running tasks.

-- Numbers of a record that somebody else wrote: whole, and such that the server takes them as a TTL.
local function whole(text, default)
  local number = tonumber(text or '') or default
  if number ~= number then return default end
  return math.floor(math.max(-1, math.min(number, 4e9)))
end

-- A producer's job waits (again): its `ttl` is for that time, and begins anew each time.
local function begin_wait(id)
  local ttl = whole(redis.call('HGET', job_key(id), 'ttl'), 0)
  if ttl > 0 then redis.call('EXPIRE', job_key(id), ttl) end
end

-- A job goes to the list that its producer would push it to; the dispatcher routes it from there.
local function to_rq_list(id, queue, front, now_iso)
  redis.call('HSET', job_key(id), 'status', 'queued', 'enqueued_at', now_iso)
  begin_wait(id)
  redis.call('SADD', 'rq:queues', list_key(queue))
  redis.call(front and 'LPUSH' or 'RPUSH', list_key(queue), id)
end

-- Free slots of a rate limit go to those that wait for one, oldest first; more than PROMOTE_MAX in a call wait for the next one.
local PROMOTE_MAX = 500

local function promote(key, now, now_iso)
  local base = 'rq:rl:' .. key
  local room = (tonumber(redis.call('HGET', base, 'concurrency') or 0) or 0) - redis.call('ZCARD', base .. ':allowed')
  while room > 0 and promoted < PROMOTE_MAX do
    local id = redis.call('ZPOPMIN', base .. ':rate_limited')[1]
    if not id then return end
    promoted = promoted + 1
    local v = redis.pcall('HMGET', job_key(id), 'origin', 'status', 'enqueue_at_front')
    if v[1] and v[2] == 'rate_limited' then
      redis.call('ZADD', base .. ':allowed', now, id)
      to_rq_list(id, v[1], v[3] == '1', now_iso)
      room = room - 1
    end
  end
end

local function free_rate_slot(id, key, now, now_iso)
  if key and redis.call('ZREM', 'rq:rl:' .. key .. ':allowed', id) == 1 then promote(key, now, now_iso) end
end

-- The job waits for nobody any more: RQ's two sets of it.
local function forget_parents(id)
  local key = 'rq:job::' .. id .. ':dependencies'
  local waited_for = redis.call('SMEMBERS', key)
  for _, parent in ipairs(waited_for) do redis.call('SREM', job_key(parent) .. ':dependents', id) end
  if #waited_for > 0 then redis.call('DEL', key) end
end

-- A producer's job has ended, whatever it was doing. `key`: its rate limit, false if it has none; without it that is read.
rq_ended = function(id, queue, now, now_iso, key)
  if key == nil then key = redis.call('HGET', job_key(id), 'rate_limit_key') end
  redis.call('ZREM', registry('scheduled', queue), id)
  redis.call('ZREM', registry('ready', queue), id)
  if key then
    redis.call('ZREM', 'rq:rl:' .. key .. ':rate_limited', id)
    free_rate_slot(id, key, now, now_iso)
  end
  forget_parents(id)
end

-- The job counts from now on; once.
rq_count_in = function(id, now)
  if redis.call('HSETNX', job_key(id), 'pq_queued_at', now) == 0 then return end
  redis.call('HSET', job_key(id), 'pq_sub', '')
  redis.call('HINCRBY', 'pilotq:counts', 'total', 1)
end

-- RQ's record of an execution: all three keys or none, or its cancel and delete fail. `listed`: also in the index of the
-- worker, which dashboards read.
local function show_execution(id, execution, worker, now, listed, ttl)
  local name = id .. ':' .. execution
  redis.call('HSET', 'rq:execution:' .. name, 'id', execution, 'job_id', id, 'created_at', now, 'last_heartbeat', now,
    'worker_name', worker)
  redis.call('ZADD', 'rq:executions:' .. id, 'inf', execution)
  redis.call('EXPIRE', 'rq:execution:' .. name, ttl)
  redis.call('EXPIRE', 'rq:executions:' .. id, ttl)
  redis.call('HSET', job_key(id), 'pq_shown', worker)
  if listed then
    redis.call('SADD', 'rq:worker:' .. worker .. ':executions', name)
    redis.call('EXPIRE', 'rq:worker:' .. worker .. ':executions', ttl)
  end
end

local function hide_execution(id, execution, worker)
  redis.call('DEL', 'rq:execution:' .. id .. ':' .. execution, 'rq:executions:' .. id)
  redis.call('SREM', 'rq:worker:' .. worker .. ':executions', id .. ':' .. execution)
end

-- When an execution whose record somebody deleted while it ran was counted as ended (unix s): its worker may show it as running
-- until it knows. A later job with its id may have an execution of the same number.
local VANISHED_TTL = 3600
local function vanished_key(id, execution) return 'pilotq:vanished:' .. id .. ':' .. execution end

-- RQ's results stream: a text is the result (type 1), or the reason of a failure. Of a failure it may hold a second line:
-- the exception, pickled, as our own client reads it.
local function add_result(id, kind, text, worker, ttl)
  local key = 'rq:results:' .. id
  if text == '' then
    redis.call('XADD', key, 'MAXLEN', '10', '*', 'type', kind, 'worker_name', worker)
  elseif string.sub(text, 1, 5) == 'file:' then -- a large value, in a file of the pilot
    redis.call('XADD', key, 'MAXLEN', '10', '*', 'type', kind, 'pq_file', text, 'worker_name', worker)
  elseif kind == '1' then
    redis.call('XADD', key, 'MAXLEN', '10', '*', 'type', kind, 'return_value', text, 'worker_name', worker)
  else
    local trace, exception = string.match(text, '^([^\n]*)\n?(.*)$')
    redis.call('XADD', key, 'MAXLEN', '10', '*', 'type', kind, 'exc_string', trace, 'worker_name', worker,
      'pq_exception', exception)
  end
  if ttl > 0 then redis.call('EXPIRE', key, ttl) else redis.call('PERSIST', key) end -- that of an earlier execution had a TTL
end

-- Under which number an end with this reason was counted, of a record whose status says it no more: RQ's requeue has set that.
local function counted_as(reason)
  if reason == '' then return 'finished' end
  return (reason == 'canceled' or reason == 'dependency' or reason == 'failures') and 'canceled' or 'failed'
end

-- RQ's times: how long the record of a job that ended so is kept; 0 = not at all, below 0 = for ever. `v`: the two fields of its
-- record that say so, if they were read.
local function rq_ttl(id, status, v)
  if status == 'canceled' then return -1 end
  v = v or redis.call('HMGET', job_key(id), 'result_ttl', 'failure_ttl')
  if status == 'finished' then return whole(v[1], 500) end
  return whole(v[2], 31536000)
end

-- The list of seconds in a field of a producer's; what is none is empty.
local function intervals_of(text)
  local valid, found = pcall(cjson.decode, text or '[]')
  if not valid then return {} end
  if type(found) == 'number' then found = {found} end
  if type(found) ~= 'table' then return {} end
  for i, interval in ipairs(found) do found[i] = whole(interval, 0) end
  return found
end

local DIGITS = '0123456789abcdefghijklmnopqrstuv'

-- A number in the order of our own ids, written as these are.
local function next_place()
  local number, text = redis.call('INCR', 'pilotq:seq'), ''
  repeat
    local digit = number % 32
    text, number = string.sub(DIGITS, digit + 1, digit + 1) .. text, (number - digit) / 32
  until number == 0
  return text
end

-- The `data` of every record of ours (COMMAND_DATA in broker/rq/jobs.py). Another one is that of a job which a producer has
-- enqueued under the id of ours: part_rq.lua parts the two.
local OWN_DATA = '(\140\25pilotq.broker.rq.jobs.runN)}t.'

-- Has a producer's job been written over this task of ours? Then its status is RQ's.
local function is_hidden(id, submission)
  local data = submission ~= '' and redis.call('HGET', job_key(id), 'data')
  return data and data ~= OWN_DATA
end
