"""The best layouts of a phase: all that are possible, cut down by arithmetic, the best of them traced."""
