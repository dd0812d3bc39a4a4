"""Shared helpers: command lines, settings, checkpoints, processes, files."""
