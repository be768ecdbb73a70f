-- heads: what waits. Changes nothing but what stands in the place of a class list and is none, and what it is told of changes.
--
-- ARGV: 1 queue id, 2 term, 3 how many ids of each list to show, 4 how many of the classes to take whose lists have got something,
--       5... class names.
-- Returns for each class, the changed ones first, {its name, length of its list, places of its first tasks in the order of all,
-- elements left in the first one if it is an array (0)}.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local found = {}

local function show(class)
  local list = list_key(class)
  set_aside(class)
  local ids = redis.call('LRANGE', list, 0, ARGV[3] - 1)
  local left = ids[1] and elements_left(ids[1]) or 0
  found[#found + 1] = {class, #ids < tonumber(ARGV[3]) and #ids or redis.call('LLEN', list), places(ids), left}
end

if ARGV[4] ~= '0' then
  for _, class in ipairs(redis.call('SPOP', 'pilotq:classes:changed', ARGV[4])) do show(class) end
end
for i = 5, #ARGV do show(ARGV[i]) end
return found
