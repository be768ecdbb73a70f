-- trim: records of ended tasks leave the short memory; the journal keeps them.
--
-- ARGV: 1 queue id, 2 term, 3 kind of registry (finished, failed, canceled), 4 queue, 5... ids.
-- Returns the number removed. An id that left the registry meanwhile (requeued) is left alone.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local removed = 0
for i = 5, #ARGV do
  -- What waits for elements of an array is released first.
  local v = redis.pcall('HMGET', job_key(ARGV[i]), 'pq_array', 'pq_elementwise')
  local needed = v[1] and v[2] and redis.call('TTL', job_key(ARGV[i])) < 0
  if not needed and redis.call('ZREM', registry(ARGV[3], ARGV[4]), ARGV[i]) == 1 then
    redis.call('DEL', job_key(ARGV[i]), 'rq:results:' .. ARGV[i], outcomes_key(ARGV[i]), values_key(ARGV[i]),
      returned_key(ARGV[i]), children_key(ARGV[i]))
    removed = removed + 1
  end
end
return removed
