"""The launcher: the process that starts, watches and ends the processes of tasks on one node."""
