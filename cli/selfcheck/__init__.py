"""`python -m pilotq.selfcheck`: tasks that find out from inside whether they run as was promised."""
