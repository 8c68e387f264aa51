"""Split the tokens of a pack over the context-parallel ranks, and back.

Each segment is cut into 2 x size pieces of equal length, and rank r takes pieces r and 2 x size - 1 - r of every segment: with
causal attention all ranks then have as much to do, and a token's rank depends on its place in its own segment alone.
Shapes: T tokens of a pack in S segments, C context ranks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TokenRows = NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """The rows of a pack that each context rank holds, in its order."""

    ranks: tuple[TokenRows, ...]
    """int64 [T / C] each."""

    @property
    def places(self) -> TokenRows:
        """Return int64 [T]: the place of each row of the pack when the ranks' rows are put one after the other."""
        return np.argsort(np.concatenate(self.ranks))


def split_pack(cu_seqlens: TokenRows, size: int) -> Split:
    """Cut a pack with segments between `cu_seqlens` (int [S + 1], from 0 to T) over `size` ranks.

    Raises ValueError if a segment's length is not a multiple of 2 x size.
    """
    bounds = np.asarray(cu_seqlens, np.int64)
    # One rank holds all rows as they are, also of segments that could not be cut.
    if size == 1:
        return Split((np.arange(bounds[-1]),))
    lengths = np.diff(bounds)
    remainders = lengths % (2 * size)
    if remainders.any():
        worst = int(lengths[remainders > 0][0])
        raise ValueError(
            f"a segment of {worst} tokens cannot be split over {size} context ranks: its length must be a multiple of"
            f" {2 * size} (data.sample_token_multiple)"
        )
    place_in_segment = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    # At least 1: an empty segment has no rows, but would divide by zero.
    piece_length = np.repeat(np.maximum(lengths // (2 * size), 1), lengths)
    piece = place_in_segment // piece_length
    # Pieces r and 2 x size - 1 - r are rank r's: an early one, which attends to little, and a late one.
    owner = np.minimum(piece, 2 * size - 1 - piece)
    return Split(tuple(np.flatnonzero(owner == rank) for rank in range(size)))
