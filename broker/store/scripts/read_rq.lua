-- read_rq: what RQ's producers have left for us, and what RQ's buttons have queued again. Changes nothing.
--
-- Says its number on a channel first: what was heard there before it was pushed before these lists were read.
-- ARGV: 1 queue id, 2 term, 3 how many jobs to show, 4 number of this call, 5... queues.
-- Returns for each job {queue, id, 1 (in the list) or 0 (waits for others), status, pq_sub, timeout, meta, webhooks}; what is
-- not there is false.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
redis.pcall('PUBLISH', 'pilotq:rq-read', ARGV[4]) -- a user of somebody's own server may not be allowed to
local found, room = {}, tonumber(ARGV[3])

local function show(queue, ids, place)
  for _, id in ipairs(ids) do
    -- A stranger may have put anything under that name.
    local v = redis.pcall('HMGET', job_key(id), 'status', 'pq_sub', 'timeout', 'meta', 'webhooks')
    if v.err then v = {false, false, false, false, false} end
    if v[1] and not v[2] then v[2] = select(3, element_of(id)) or false end -- the id of an element of ours that has no record
    found[#found + 1] = {queue, id, place, unpack(v, 1, 5)}
    room = room - 1
  end
end

for i = 5, #ARGV do
  if room > 0 then show(ARGV[i], redis.pcall('LRANGE', list_key(ARGV[i]), 0, room - 1), 1) end
  if room > 0 then
    show(ARGV[i], redis.pcall('ZRANGEBYSCORE', registry('deferred', ARGV[i]), 0, ADOPTED - 1, 'LIMIT', 0, room), 0)
  end
end
return found
