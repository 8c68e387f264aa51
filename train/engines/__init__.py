"""Engines: what holds gradients and optimizer of a model, updates its weights, and gives checkpoints what it holds."""
