"""The web page of a running pilot, with RQ's beside it."""
