"""The sides of benchmarks/peers.py, each run by the interpreter that has the peer: they cannot import pilotq."""
