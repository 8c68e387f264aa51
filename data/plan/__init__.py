"""From lengths alone: which sample is drawn when, which samples share a pack, and which rank gets it."""
