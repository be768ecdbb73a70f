"""The Lua scripts: one file for each transition; lib.lua and lib_rq.lua are put in front of each."""
