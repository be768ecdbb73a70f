"""The service side of QCG-PilotJob on a pilot: its requests and replies, the registry of jobs, and the report."""
