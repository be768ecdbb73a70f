"""Nodes whose launchers only pretend to start processes; all else of them is a real worker's (docs/figures.md)."""
