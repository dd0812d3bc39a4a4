"""What all scripts stand on: command lines, settings, checkpoints, processes, files."""
