"""The Lua scripts: one file for each transition; those that begin with lib are put in front of others."""
