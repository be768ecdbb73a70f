"""Benchmarks: `make bench` measures the figures of docs/figures.md."""
