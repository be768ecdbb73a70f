"""The worker process of one node: its slots, and the launching, ending and reporting of executions."""
