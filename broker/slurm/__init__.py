"""The Slurm allocation that a pilot or a worker runs in: its nodes, its end, its environment variables."""
