"""Reinforcement learning: a policy writes answers, rewards judge them, and a phase trains on them."""
