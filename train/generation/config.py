"""Options of generation. Nothing here imports torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Memory of generation, in tokens."""

    pack_tokens: int
    """Of the prompts that enter together; a longer one enters alone."""
    cache_tokens: int
    """Of all sequences that grow together, each counted as long as the longest may become."""
