-- cancel_orphans: what waits for a record that somebody deleted waits no longer: release_dependents.lua omits it.
--
-- ARGV: 1 queue id, 2 term, 3... ids that something waited for.
-- Returns the arrays that wait element by element for an array that is gone, of very many some: they are to be canceled.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local found, FOUND_MAX = {}, 500
for i = 3, #ARGV do
  local id = ARGV[i]
  local array = string.match(id, '^(.-)_%d+$')
  -- A stranger's key under its name is no record.
  local own = redis.pcall('HMGET', job_key(id), 'status', 'pq_reason')
  local of = array and redis.pcall('HMGET', job_key(array), 'pq_array', 'pq_reason') or {}
  local there = own[1] or count_of(of[1])
  -- What was refused because its record is damaged says no more how its elements end.
  if own[2] == 'refused' and redis.call('EXISTS', elementwise_key(id)) == 1 or of[2] == 'refused' then there = false end
  if redis.call('EXISTS', dependents_key(id), elementwise_key(id)) == 0 then
    redis.call('SREM', 'pilotq:parents', id)
  elseif not there and #found < FOUND_MAX then
    -- Behind the entry of its own end, if that is still there: then nothing is left for this one.
    if redis.call('EXISTS', dependents_key(id)) == 1 then redis.call('RPUSH', 'pilotq:release', 'o:' .. id) end
    for _, entry in ipairs(redis.call('LPOP', elementwise_key(id), FOUND_MAX) or {}) do
      found[#found + 1] = string.match(entry, '^%d+:(.*)$')
    end
    if redis.call('EXISTS', elementwise_key(id)) == 0 then redis.call('SREM', 'pilotq:parents', id) end
  end
end
if redis.call('EXISTS', 'pilotq:release') == 1 then wake() end
return found
