"""Operations that a GPU runs as one kernel each, with the same results on a CPU."""
