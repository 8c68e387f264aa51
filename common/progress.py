"""Type of the callback by which long work reports its progress."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the items done and all items known so far."""
PartProgress = Callable[[str, int, int], None]
"""Called with a part's name, the items done of it, and all its items."""
ProgressOf = Callable[[str], Progress]
"""Returns the progress callback for the name of a piece of work."""
