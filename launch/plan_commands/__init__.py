"""What launch/plan.py is made of: its words, its other commands, and the plan before a run."""
