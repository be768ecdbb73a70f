"""pilotq: a pilot-job manager on Redis and RQ."""

__version__ = "0.1.0"
