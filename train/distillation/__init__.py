"""Teachers of a phase that distils, live and stored, and the pass that stores one."""
