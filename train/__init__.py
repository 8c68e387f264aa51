"""Phases, the training loop, optimizer, checkpoints, metrics and evaluation."""
