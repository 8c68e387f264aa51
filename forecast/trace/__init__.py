"""The trace of a step: its operations, memory, collectives and waits, recorded on a real rank or on an imagined one."""
