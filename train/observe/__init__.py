"""What the outside sees of a run: its log, its screen, its trackers and its status."""
