-- part_rq: RQ's producers have enqueued jobs under ids of ours, and RQ has written them over our records. Ours are as they were,
-- and the jobs go on under ids of their own.
--
-- RQ writes its own fields only. Where ours stood before is known from the registries, which RQ leaves alone.
-- ARGV: 1 queue id, 2 term, 3 now (unix s), 4 ttl of ended records (s), 5... for each job four: queue, id, 1 (in the list) or 0 (waits for
--       others), the description of ours.
-- Returns for each the new id of the job; an empty text where it is not there any more.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local now, ttl = ARGV[3], ARGV[4]
-- What RQ writes and we do not.
local FOREIGN = {'success_callback_name', 'failure_callback_name', 'stopped_callback_name', 'last_heartbeat', 'group_id',
  'number_of_retries', 'retries_left', 'retry_intervals', 'enqueue_at_front_on_retry', 'repeats_left', 'repeat_intervals',
  'rate_limit_key', 'rate_limit_concurrency', 'result', 'exc_info', 'success_callback_timeout', 'failure_callback_timeout',
  'stopped_callback_timeout', 'webhooks', 'result_ttl', 'failure_ttl', 'dependency_id', 'dependency_ids', 'meta', 'ttl',
  'allow_dependency_failures', 'enqueue_at_front', 'timeout'}

-- The status that ours had.
local function status_before(id, queue, f)
  if redis.call('ZSCORE', registry('wip', queue), id .. ':' .. (f.pq_array and '0' or f.pq_exec or '')) then return 'started' end
  if f.pq_reason == 'stopped' then return 'stopped' end
  for _, kind in ipairs({'finished', 'failed', 'canceled'}) do
    if (f.pq_reason or kind == 'finished') and redis.call('ZSCORE', registry(kind, queue), id) then return kind end
  end
  if f.pq_reason then return f.pq_reason == '' and 'finished' or 'failed' end
  if redis.call('ZSCORE', registry('scheduled', queue), id) then return 'scheduled' end
  if tonumber(f.pq_open_parents or '0') > 0 or f.pq_parents or f.pq_joining then return 'deferred' end
  return 'queued'
end

local function restore(id, f, description)
  local queue, key = queue_of(class_in(f.pq_class)), job_key(id)
  if own_task(id) then
    f.pq_exec, f.pq_node = unpack(redis.call('HMGET', key, 'pq_exec', 'pq_node'))
  end
  local status = status_before(id, queue, f)
  redis.call('HDEL', key, unpack(FOREIGN))
  for _, name in ipairs({'started_at', 'ended_at', 'worker_name'}) do
    if f[name] == '' then redis.call('HDEL', key, name) end
  end
  if f.worker_name == '' and f.pq_node then redis.call('HSET', key, 'worker_name', string.match(f.pq_node, '^(.*):')) end
  if f.pq_array_of then description = redis.call('HGET', job_key(f.pq_array_of), 'description') or description end
  redis.call('HSET', key, 'status', status, 'origin', queue, 'data', OWN_DATA, 'description', description)
  if ENDED[status] and redis.call('TTL', key) < 0 and not f.pq_array_of then redis.call('EXPIRE', key, ttl) end
  if status == 'queued' then queue_up(id, f.pq_class) end -- it is in its list already, or was to get there now
  if status == 'deferred' then redis.call('ZADD', registry('deferred', queue), ADOPTED + now, id) end
end

-- What was written of the job, under another id.
local function move(queue, id, listed, flat)
  local new, fields = next_place(), {}
  for k = 1, #flat, 2 do
    if string.sub(flat[k], 1, 3) ~= 'pq_' then
      fields[#fields + 1] = flat[k]
      fields[#fields + 1] = flat[k + 1]
    end
  end
  redis.call('HSET', job_key(new), unpack(fields))
  redis.call('HSET', job_key(new), 'status', listed and 'queued' or 'deferred', 'origin', queue)
  if listed then
    redis.call('RPUSH', list_key(queue), new)
    return new
  end
  redis.call('ZADD', registry('deferred', queue), now, new)
  for _, parent in ipairs(redis.call('SMEMBERS', 'rq:job::' .. id .. ':dependencies')) do
    redis.call('SADD', 'rq:job::' .. new .. ':dependencies', parent)
    redis.call('SREM', job_key(parent) .. ':dependents', id)
    redis.call('SADD', job_key(parent) .. ':dependents', new)
  end
  redis.call('DEL', 'rq:job::' .. id .. ':dependencies')
  return new
end

local function part(queue, id, listed, description)
  local flat, f = redis.call('HGETALL', job_key(id)), {}
  for k = 1, #flat, 2 do f[flat[k]] = flat[k + 1] end
  local is_alone = not f.pq_class and element_of(id) -- of ours there is no record
  if not is_alone then class_in(f.pq_class) end
  number_in('pq_open_parents', f.pq_open_parents, 0)
  if listed and redis.call('LREM', list_key(queue), 1, id) == 0 then return '' end
  if not listed and redis.call('ZREM', registry('deferred', queue), id) == 0 then return '' end
  local new = move(queue, id, listed, flat)
  if is_alone then redis.call('DEL', job_key(id)) else restore(id, f, description) end
  return new
end

local answer = {}
for i = 5, #ARGV, 4 do
  local done, new = guarded(nil, ARGV[i + 1], part, ARGV[i], ARGV[i + 1], ARGV[i + 2] == '1', ARGV[i + 3])
  answer[#answer + 1] = done and new or ''
end
flush_ready()
wake()
return answer
