"""What launch/submit.py is made of: its words, the checks of each job, the scripts, and the records of a submission."""
