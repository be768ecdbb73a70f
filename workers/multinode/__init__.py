"""Tasks over several nodes: remote processes, launch agents and MPI launchers, and their common end."""
