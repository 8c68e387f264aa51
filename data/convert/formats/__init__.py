"""Source formats, one file each: how a record of theirs becomes a sample."""
