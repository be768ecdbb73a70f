-- free_rate_slots: slots of RQ's rate limits that nobody will give back are free again. Event rate_slot.
--
-- A slot is held by a job that is queued or runs, and by an execution that RQ still sees. Limits that nobody uses go.
-- ARGV: 1 queue id, 2 term, 3 now (unix s), 4 now (ISO).
-- Returns the number of limits.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local now, now_iso = tonumber(ARGV[3]), ARGV[4]
local names = redis.call('SMEMBERS', 'rq:rl-keys')

local function free(key)
  local base = 'rq:rl:' .. key
  for _, id in ipairs(redis.call('ZRANGE', base .. ':allowed', 0, -1)) do
    local status = redis.pcall('HGET', job_key(id), 'status')
    local held = status == 'queued' or status == 'started' or redis.call('EXISTS', 'rq:executions:' .. id) == 1
    if not held then redis.call('ZREM', base .. ':allowed', id) end
  end
  promote(key, now, now_iso)
  if redis.call('EXISTS', base .. ':allowed', base .. ':rate_limited') == 0 then
    redis.call('DEL', base)
    redis.call('SREM', 'rq:rl-keys', key)
  end
end

for _, key in ipairs(names) do guarded(nil, key, free, key) end
return #names
