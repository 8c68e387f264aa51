"""What guards a run: who has its folder, what ends it early, which rank stands still, and what its end is called."""
