"""The commands: each file here is one, and does little but compose a configuration and call visionloom.train or visionloom.data."""
