-- free_rate_slots: slots of RQ's rate limits that nobody will give back are free again. Event rate_slot.
--
-- A slot is held by a job that is queued or runs, and by an execution that RQ still sees. Limits that nobody uses go. A call
-- looks at some of the limits, and of the holders of a limit that has very many at some by chance; the next one goes on.
-- ARGV: 1 queue id, 2 term, 3 now (unix s), 4 now (ISO), 5 cursor of the walk through all limits.
-- Returns the cursor of the next call, 0 when it was the last one.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local now, now_iso = tonumber(ARGV[3]), ARGV[4]
local HOLDERS_MAX, HOLDERS_LEAST = 2000, 10 -- of one call, and of one limit when these are spent
local looked_at = 0

local function free(key)
  local base = 'rq:rl:' .. key
  local holders = redis.call('ZRANDMEMBER', base .. ':allowed', math.max(HOLDERS_MAX - looked_at, HOLDERS_LEAST))
  looked_at = looked_at + #holders
  for _, id in ipairs(holders) do
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

local page = redis.call('SSCAN', 'rq:rl-keys', ARGV[5], 'COUNT', 100)
for _, key in ipairs(page[2]) do guarded(nil, key, free, key) end
return page[1]
