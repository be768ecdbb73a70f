"""The command line: what users type and read."""
