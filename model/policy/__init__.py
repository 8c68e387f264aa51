"""Losses of reinforcement learning: how a sampled token's probability is to change."""
