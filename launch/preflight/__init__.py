"""Before step 1: what each rank is and how fast, in one table, and which rank does not answer."""
