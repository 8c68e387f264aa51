"""Know before renting: one real step of every kind of rank of a run on no device, and its memory, time and cost on a GPU."""
