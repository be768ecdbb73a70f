-- heartbeat: a worker is alive.
--
-- ARGV: 1 queue id, 2 node, 3 incarnation, 4 ttl of the worker's record (s),
--       5 msgpack [[id, execution, started (unix s), class], ...] that RQ's tools are to show, 6 sha1 of its record in pilotq:nodes,
--       7... fields and values, all of RQ's record.
-- Returns 1; 2 when its record in pilotq:nodes is damaged or gone; 0 when a newer incarnation has registered, or this one was
-- given up. A record that expired (a machine that was asleep) is made again.
if not queue_id_ok() then return queue_id_error() end
local key = 'rq:worker:' .. ARGV[2]
local known = redis.call('HGET', key, 'pq_incarnation')
local record = redis.call('HGET', 'pilotq:nodes', ARGV[2])
if not known then
  local valid, found = pcall(cjson.decode, record or '')
  known = valid and type(found) == 'table' and string.format('%d', tonumber(found.incarnation) or 0)
end
if known ~= ARGV[3] then return 0 end
enlist('SADD', key)
redis.call('HSET', key, 'pq_incarnation', ARGV[3], unpack(ARGV, 7))
redis.call('EXPIRE', key, ARGV[4])

local function show(item)
  local v = redis.pcall('HMGET', job_key(item[1]), 'status', 'pq_exec', 'pq_sub')
  if not v[1] and record_leased(item[1]) or v[1] == 'queued' and own_task(item[1], tostring(item[2])) then
    v = redis.pcall('HMGET', job_key(item[1]), 'status', 'pq_exec', 'pq_sub')
  end
  -- In the index only what we made: RQ's pages of workers unpickle what they find there, and fail as a whole.
  if v[1] == 'started' and v[2] == tostring(item[2]) then
    show_execution(item[1], v[2], ARGV[2], item[3], (v[3] or '') ~= '', ARGV[4])
  elseif not v[1] and item[3] > tonumber(redis.call('GET', vanished_key(item[1], item[2])) or 0) then
    -- RQ's delete of what it sees running takes it out of there, too: only so does the reconciler find it.
    redis.call('ZADD', registry('wip', queue_of(item[4])), 'inf', item[1] .. ':' .. item[2])
  end
end

for _, item in ipairs(cmsgpack.unpack(ARGV[5])) do guarded(nil, item[1], show, item) end
return record and redis.sha1hex(record) == ARGV[6] and 1 or 2
