"""Compatibility with RQ 3: jobs of its producers, its worker commands, and repair of what its tools leave behind."""
