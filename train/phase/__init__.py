"""A phase of a run: its options, what trains in it, and what is measured around it."""
