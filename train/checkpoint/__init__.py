"""Checkpoints: writing, reading, and distrust of files that somebody else made."""
