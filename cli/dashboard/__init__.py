"""The web page of a running pilot, with RQ's beside it."""

USER = "pilotq"  # the name to log in with
