"""The tokens of a pack over context ranks: every token once, as much work for each, and back in place.

Reference: a brute-force count of the token pairs that causal attention looks at.
"""

import numpy as np
import pytest

from visionloom.parallel.context import split_pack

BOUNDS = np.cumsum([0, 8, 32, 16, 8, 64])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_token_once_and_back(size: int) -> None:
    split = split_pack(BOUNDS, size)
    joined = np.concatenate(split.ranks)
    assert sorted(joined.tolist()) == list(range(BOUNDS[-1]))
    assert {len(rows) for rows in split.ranks} == {BOUNDS[-1] // size}
    assert (joined[split.places] == np.arange(BOUNDS[-1])).all()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_as_much_to_attend(size: int) -> None:
    place = np.concatenate([np.arange(n) for n in np.diff(BOUNDS)])
    work = {int((place[rows] + 1).sum()) for rows in split_pack(BOUNDS, size).ranks}
    assert len(work) == 1


@pytest.mark.parametrize("size", [2, 4])
def test_a_segment_is_cut_into_chunks_from_both_ends(size: int) -> None:
    chunk = 8 // (2 * size)
    for rank, rows in enumerate(split_pack(np.array([0, 8]), size).ranks):
        ends = [
            *range(rank * chunk, (rank + 1) * chunk),
            *range(8 - (rank + 1) * chunk, 8 - rank * chunk),
        ]
        assert rows.tolist() == ends


def test_a_segment_that_cannot_be_cut_names_the_option() -> None:
    with pytest.raises(
        ValueError, match=r"6 tokens.*2 context ranks.*multiple of 4 \(data.sample_token_multiple\)"
    ):
        split_pack(np.array([0, 8, 14]), 2)
