"""Figures of speed: `make bench`."""
