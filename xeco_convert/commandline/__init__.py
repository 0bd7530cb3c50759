"""What both commands share: running with exit codes and signals, progress, and what they write beside their main work."""
