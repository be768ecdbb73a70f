"""The Lua scripts: one file for each transition, lib.lua in front of each."""
