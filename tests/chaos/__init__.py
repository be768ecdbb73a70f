"""A pilot under random faults: `python -m tests.chaos`."""
