"""The worker: one node; launch, pin, watch, end, report."""
