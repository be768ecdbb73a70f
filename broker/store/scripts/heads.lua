-- heads: what waits. Changes nothing but what stands in the place of a class list and is none.
--
-- ARGV: 1 queue id, 2 term, 3 how many ids of each list to show, 4... class names.
-- Returns for each class {length of its list, places of its first tasks in the order of all, elements left in the first one
-- if it is an array (0)}.
if not queue_id_ok() then return queue_id_error() end
if not term_ok() then return term_error() end
local found = {}
for i = 4, #ARGV do
  local list = list_key(ARGV[i])
  set_aside(ARGV[i])
  local ids = redis.call('LRANGE', list, 0, ARGV[3] - 1)
  local left = ids[1] and elements_left(ids[1]) or 0
  found[#found + 1] = {#ids < tonumber(ARGV[3]) and #ids or redis.call('LLEN', list), places(ids), left}
end
return found
