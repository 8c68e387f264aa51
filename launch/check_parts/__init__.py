"""What launch/check.py is made of: facts of a machine, checks of correctness on it, and its speeds."""
