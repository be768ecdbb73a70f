"""The machine that a worker runs on: its CPUs and memory, its node's name, and cleanup after a dead worker."""
