-- report_started: executions that live longer than a moment have been launched. Changes no status.
--
-- ARGV: 1 queue id, 2... six for each: id, execution, allocation, started (ISO), stdout path, stderr path.
-- Returns the number of those whose execution stands.
if not queue_id_ok() then return queue_id_error() end
local number = 0
for i = 2, #ARGV, 6 do
  local v = redis.pcall('HMGET', job_key(ARGV[i]), 'status', 'pq_exec')
  local needs_record = not v[1] and record_leased or v[1] == 'queued' and own_task
  if needs_record and select(2, guarded(nil, ARGV[i], needs_record, ARGV[i], ARGV[i + 1])) then
    v = redis.pcall('HMGET', job_key(ARGV[i]), 'status', 'pq_exec')
  end
  if v[1] == 'started' and v[2] == ARGV[i + 1] then
    redis.call('HSET', job_key(ARGV[i]), 'pq_cpus', ARGV[i + 2], 'started_at', ARGV[i + 3], 'pq_slot', '1',
      'pq_running', '1', 'pq_out', ARGV[i + 4], 'pq_err', ARGV[i + 5])
    number = number + 1
  end
end
return number
