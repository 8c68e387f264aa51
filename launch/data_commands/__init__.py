"""The subcommands of launch/data.py, one file each: `add(commands)` declares its words, `run(options)` does the work.

Only the standard library is imported at the top of these files, so that help and wrong words need no numpy or torch.
"""
