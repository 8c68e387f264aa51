"""A live teacher in a layout of its own: every row comes to the ranks that need it, and faults end all ranks alike.

References: a table of all rows of all micro-batches, for layouts of up to twelve ranks that are played in this process; the teacher in
its student's layout, for real runs (test_run.py) and for gradients (tests/train/test_parity.py).
"""

from collections.abc import Iterator
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.parallel.context import split_pack
from visionloom.tests.model.reference import TestPack
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Case, Layout, backward, packs_of
from visionloom.train.distillation.row_exchange import LastStage, RowExchange

Degrees = tuple[int, int, int, int]
"""Of tensor, context, data and pipeline."""


def last_stages(degrees: Degrees) -> list[LastStage]:
    """What each rank knows of a layout; ranks are counted from tensor to pipeline, as Megatron-core does."""
    tensor, context, data, pipeline = degrees
    places = [(d, c, t) for d, c, t in product(range(data), range(context), range(tensor))]
    before = [None] * len(places) * (pipeline - 1)
    ranks = {place: len(before) + number for number, place in enumerate(places)}
    return [LastStage(ranks, place, data, context, tensor) for place in [*before, *places]]


def micro_batches(packs: list[TestPack], stage: LastStage) -> list[Any]:
    """Those of a rank."""
    copy = stage.place[0] if stage.place else 0
    return packs[copy :: stage.copies]


def rows_of(pack: TestPack, number: int, stage: LastStage) -> Tensor:
    """What a rank has of a micro-batch: its number and the token, [R, 2], in the order of the rank's tokens."""
    assert stage.place is not None
    tokens = split_pack(pack.cu_seqlens.numpy(), stage.context).ranks[stage.place[1]]
    supervised = tokens[pack.loss_weights.numpy()[tokens] > 0]
    return torch.tensor([[number, token] for token in supervised.tolist()]).reshape(-1, 2)


def held(packs: list[TestPack], stage: LastStage) -> Iterator[Tensor]:
    """The rows of all of a rank's micro-batches."""
    if stage.place is None:
        return
    for number in range(stage.place[0], len(packs), stage.copies):
        yield rows_of(packs[number], number, stage)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((1, 1, 4, 1), (2, 2, 1, 1)),
        ((2, 1, 1, 2), (1, 4, 1, 1)),
        ((1, 2, 2, 3), (4, 1, 3, 1)),
        ((4, 1, 2, 1), (2, 1, 4, 1)),
        ((2, 2, 3, 1), (1, 1, 2, 6)),
        ((3, 1, 4, 1), (2, 2, 3, 1)),
    ],
)
def test_every_row_comes_to_the_ranks_that_need_it(student: Degrees, teacher: Degrees) -> None:
    """Twelve micro-batches, which two, three and four copies can share."""
    packs = packs_of("everything") + packs_of("images") + packs_of("text")
    theirs, ours = last_stages(teacher), last_stages(student)
    nothing = torch.empty(0, 2, dtype=torch.int64)
    ways = [RowExchange(*stages, nothing) for stages in zip(ours, theirs, strict=True)]
    sent = []
    for way in ways:
        batches = micro_batches(packs, way.teacher)
        sent.append(list(way.sent(list(held(packs, way.teacher)), batches)))

    for rank, way in enumerate(ways):
        batches = micro_batches(packs, way.student)
        arrivals = way.arrivals(batches)
        parts = []
        for sender, pairs in enumerate(sent):
            rows = [part for receiver, part in pairs if receiver == rank]
            parts.append(torch.cat([nothing, *rows]))
            expected_rows = [each.rows for each in arrivals if each.sender == sender]
            assert len(parts[-1]) == sum(map(len, expected_rows))
        made = way.sorted_in(torch.cat(parts), arrivals, len(batches))
        expected = list(held(packs, way.student))
        assert len(made) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def told_of_another_reading(layout: Layout, packs: list[TestPack]) -> str:
    """What a rank is told if its teacher could not read the samples of a pack; runs on every rank of the pool."""
    from visionloom.train.distillation import own_layout

    def agree(batches: list[Any], topology: object) -> list[Any]:
        return [batches[0].without(torch.ones(4, dtype=torch.bool)), *batches[1:]]

    with patch.object(own_layout, "agree_on_unreadable", agree), pytest.raises(UserError) as caught:
        backward(layout, packs)
    return str(caught.value)


def test_another_reading_of_the_teacher_ends_all_ranks(pool: RankPool) -> None:
    layout = Layout(2, {"tensor": 2}, Case(teacher="live"), teacher={"pipeline": 2})
    for line in pool.run(2, told_of_another_reading, layout, packs_of("everything")):
        assert line.startswith("the teacher and the student have read different samples")
