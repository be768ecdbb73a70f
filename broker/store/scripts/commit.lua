-- commit: a staged submit becomes visible, whole or not at all. Events commit, commit_deferred, commit_omitted.
--
-- The hashes of a small submission come with the call. Those of a larger one (status queued or deferred) the client has written
-- with a TTL; nothing refers to them yet. Of a large one it has written the work in pieces before them: while these are there, all
-- hashes are. Such a submission is accepted in one call, and its pieces become tasks in as many, made by the client, and by
-- release_dependents.lua where that dies.
-- ARGV: 1 queue id, 2 submission key, 3 now (unix s), 4 now (ISO), 5 first task number, 6 number of records,
--       7 number of tasks, 8 ttl of canceled records (s), 9 msgpack {
--         groups = [[class, [id, ...]], ...]      go straight to their lists
--         waits  = [[id, class, [dependency, ...], number of tasks], ...]    wait for whole tasks; in pieces with a fifth: some of its
--           parents: 1 the first, 0 others, -1 the last ones
--         elementwise = [[array id, class, [parent array, ...], number of tasks], ...] wait element by element
--         extra  = [key, ...]                                          other staged keys that are to stay
--         shared = key of what all of them share
--         submitter = id of the task within which they are submitted
--         layout = of a submission with bundles: which tasks are in which, for those who ask for its ids again
--         past   = {parent = status}: parents that only the journal knows
--         pieces = number of pieces, of a large submission, whose work this is not; each has key = submission key, too, and sizes =
--           {id = number of tasks} of arrays
--       },
--       10 what to do: whole (all of this), check (only look at the parents), accept (a large submission), rest (its next piece),
--       11... of a submission that is not staged: what all of them share (packed SubmitContext), number of fields and values that
--         all records have in common, these, and for each hash to write: its key, 1 (a record) or 0, number of its own fields
--         and values, these.
-- A parent is a task, an array, or one element of an array (<array>_<index>).
-- Returns {'ok'}; {'more'} when a piece was handled, and others may be left; {'again', first number, number of records, layout} when this key was
--       committed before (nothing is written); {'taken'} when a record is there already; {'gone'} when a staged key has expired; {'unknown', [id, ...]} when parents do not
--       exist; {'unequal', id} when a parent to wait for element by element is no array of as many elements.
if not queue_id_ok() then return queue_id_error() end
local key, now, now_iso, first, records, total, ttl = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local mode = ARGV[10]
if mode == 'rest' then
  if not admit_piece(first, now, now_iso, ttl) then return {'ok'} end
  flush_ready()
  flush_tally(ttl)
  flush_lines()
  wake()
  return {'more'}
end
local known = redis.call('HMGET', submit_key(key), 'first', 'records', 'layout')
if known[1] then return {'again', known[1], known[2], known[3] or ''} end
local work = cmsgpack.unpack(ARGV[9])

-- The hashes that come with the call: {key, is a record, place of its first value, of its last one}.
local common = 12
local behind_common = common + 1 + (tonumber(ARGV[common]) or 0)
local carried = {}
do
  local at = behind_common
  while ARGV[at] do
    local last = at + 2 + tonumber(ARGV[at + 2])
    carried[#carried + 1] = {ARGV[at], ARGV[at + 1] == '1', at + 3, last}
    at = last + 1
  end
end

local function is_taken()
  local names = {}
  for i, hash in ipairs(carried) do names[i] = hash[1] end
  for i = 1, #names, PIECE do
    if redis.call('EXISTS', unpack(names, i, math.min(i + PIECE - 1, #names))) > 0 then return true end
  end
end

-- What else in this submission depends on them can know already.
local function know_carried()
  for _, hash in ipairs(carried) do
    local id = hash[2] and string.match(hash[1], '^rq:job:(.*)$')
    for k = hash[3], id and hash[4] or 0, 2 do
      if ARGV[k] == 'status' then parents[id] = ARGV[k + 1] end
      if ARGV[k] == 'pq_array' then
        texts[id] = ARGV[k + 1]
        counts[id] = count_of(texts[id])
      end
    end
  end
end

local function write_carried()
  for _, hash in ipairs(carried) do
    local fields = {}
    for k = common + 1, hash[2] and behind_common - 1 or common do fields[#fields + 1] = ARGV[k] end
    for k = hash[3], hash[4] do fields[#fields + 1] = ARGV[k] end
    redis.call('HSET', hash[1], unpack(fields))
  end
  local shared = 'pilotq:shared:' .. work.shared
  if redis.call('SET', shared, ARGV[11], 'NX') == false and redis.call('TTL', shared) >= 0 then redis.call('PERSIST', shared) end
end

-- 1. Read: are all hashes there, and what became of the parents?
local function all_there()
  local found, all = 0, {'pilotq:shared:' .. work.shared}
  for _, group in ipairs(work.groups) do for _, id in ipairs(group[2]) do all[#all + 1] = job_key(id) end end
  for _, item in ipairs(work.waits) do all[#all + 1] = job_key(item[1]) end
  for _, item in ipairs(work.elementwise) do all[#all + 1] = job_key(item[1]) end
  for _, name in ipairs(work.extra) do all[#all + 1] = name end
  for i = 1, #all, PIECE do found = found + redis.call('EXISTS', unpack(all, i, math.min(i + PIECE - 1, #all))) end
  return found == #all and all
end

local staged = {'pilotq:shared:' .. (work.shared or ''), staged_key(first)}
if #carried > 0 then
  staged = {}
  if is_taken() then return {'taken'} end
  if #work.waits + #work.elementwise > 0 then know_carried() end
elseif mode == 'whole' then
  staged = all_there()
  if not staged then return {'gone'} end
elseif mode == 'accept' and (redis.call('EXISTS', staged[1]) == 0 or redis.call('LLEN', staged[2]) ~= work.pieces) then
  return {'gone'}
end
local unknown, asked = {}, {}
for _, items in ipairs({work.waits or {}, work.elementwise or {}}) do
  for _, item in ipairs(items) do
    for _, text in ipairs(item[3]) do
      local parent = parent_of(text)
      if not asked[parent] and not status_of(parent, work.past) then unknown[#unknown + 1] = parent end
      asked[parent] = true
    end
  end
end
if #unknown > 0 then return {'unknown', unknown} end
for _, item in ipairs(work.elementwise or {}) do
  for _, parent in ipairs(item[3]) do
    if counts[parent] ~= item[4] then return {'unequal', parent} end
  end
end
if mode == 'check' then return {'ok'} end

-- 2. Write.
work.child_of = work.submitter and joins.name_of(work.submitter)
if #carried > 0 then write_carried() end
for _, name in ipairs(staged) do redis.call('PERSIST', name) end
redis.call('HSET', submit_key(key), 'first', first, 'records', records, 'total', total, 'left', total,
  'shared', work.shared)
if work.child_of then
  redis.call('HSET', submit_key(key), 'child_of', work.child_of)
  joins.expect(work.child_of, tonumber(records))
end
if work.layout then redis.call('HSET', submit_key(key), 'layout', work.layout) end
redis.call('ZADD', 'pilotq:submissions', first, key)
count_up('pilotq:shared-refs', work.shared, 1)
count_up('pilotq:counts', 'total', total)
if mode == 'accept' then
  redis.call('RPUSH', 'pilotq:release', 's:' .. first)
else
  admit(work, false, now, now_iso, ttl)
end
flush_ready()
flush_tally(ttl)
flush_lines()
wake()
return {'ok'}
