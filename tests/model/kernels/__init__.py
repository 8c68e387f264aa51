"""Operations that are one kernel on a GPU."""
