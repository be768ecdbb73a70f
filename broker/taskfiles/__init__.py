"""Readers of files of tasks: plain lines, TOML, JSON, and request files of QCG-PilotJob."""
