"""Rows on their way to the experts of other ranks. References: the sets of each token's experts, and the order of calls."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from visionloom.model import experts
from visionloom.model.dispatch import Dispatch, ExpertGroups
from visionloom.model.experts import GroupedExperts
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.model.reference import TestPack
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Case, Layout, backward, packs_of

TOKENS, EXPERTS, EACH = 40, 8, 3
EXPERTS_A_TOKEN = 2
"""Of the tiny mixture."""


def groups_of(parallel: ParallelConfig) -> ExpertGroups:
    """The ranks that share the experts; runs on a rank of the pool."""
    groups = topologies.start(parallel, torch.device("cpu")).groups
    return ExpertGroups(EXPERTS, groups.ep, groups.expt_tp, groups.tp_ep)


def choice_of(rank: int) -> Tensor:
    """The experts that the tokens of a rank choose, int32 [n, k]: fewer tokens a rank, the fourth has none, nobody takes the last two."""
    generator = torch.Generator().manual_seed(rank)
    draws = torch.rand(TOKENS - TOKENS // 3 * rank if rank < 3 else 0, EXPERTS, generator=generator)
    draws[:, -2:] = 0.0
    return draws.topk(EACH).indices.int()


def sizes(expert_tensor: int) -> tuple[list[int], int, list[list[float]]]:
    """Rows to each expert rank, rows of this rank's experts, and those rows with their weights; runs on a rank of the pool."""
    ranks = dist.get_world_size() // expert_tensor
    groups = groups_of(
        ParallelConfig(tensor=expert_tensor, expert=ranks, expert_tensor=expert_tensor)
    )
    rank = dist.get_rank()
    dispatch = Dispatch(choice_of(rank), groups)
    # What a row is of: the rank of its token, and the token's number.
    numbers = torch.arange(len(dispatch.experts)).float()
    tokens = torch.stack((torch.full_like(numbers, rank), numbers), 1)
    weights = rank + (numbers[:, None] * EACH + torch.arange(EACH)) / (TOKENS * EACH)
    rows, scalars, ends = dispatch.arrive(dispatch.leave(tokens, weights))
    experts = torch.bucketize(torch.arange(len(rows)), ends, right=True)
    table = torch.cat([experts[:, None] * 1.0, rows, scalars[:, None]], 1)
    return dispatch.exchange.sent, dispatch.exchange.rows, table.tolist()


def check(ranks: int, expert_tensor: int, pool: RankPool) -> None:
    expert_ranks, own = ranks // expert_tensor, EXPERTS * expert_tensor // ranks
    choices = [choice_of(rank) for rank in range(ranks)]
    for rank, (sent, rows, table) in enumerate(pool.run(ranks, sizes, expert_tensor)):
        homes = [set(row) for row in (choices[rank] // own).tolist()]
        assert sent == [sum(home in token for token in homes) for home in range(expert_ranks)]
        assert sum(sent) < choices[rank].numel() or not homes, "experts of one rank share a row"

        first = rank // expert_tensor * own
        expected = [
            [
                expert - first,
                float(source),
                float(token),
                source + (token * EACH + slot) / (TOKENS * EACH),
            ]
            for source, choice in enumerate(choices)
            for token, chosen in enumerate(choice.tolist())
            for slot, expert in enumerate(chosen)
            if first <= expert < first + own
        ]
        assert rows == len(expected)
        torch.testing.assert_close(torch.tensor(sorted(table)), torch.tensor(sorted(expected)))
        assert [row[0] for row in table] == sorted(row[0] for row in table)


def test_a_token_goes_once_to_each_rank_of_its_experts(pool: RankPool) -> None:
    check(4, 1, pool)


def test_ranks_that_cut_experts_have_the_rows_of_both(pool: RankPool) -> None:
    check(4, 2, pool)


class Calls:
    """Calls in their order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def of(self, name: str, function: Any) -> Any:
        """A function that notes its name before it runs."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            result = function(*args, **kwargs)
            if kwargs.get("async_op"):
                result = mock.Mock(wait=self.of("awaited", result.wait))
            return result

        return noted

    def of_messages(self, function: Any) -> Any:
        """The function that begins messages, noted as `rows` or, if they are as narrow as weights and numbers, `few`."""

        def noted(coming: Tensor, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
            name = "few" if rows.shape[1] == EXPERTS_A_TOKEN else "rows"
            return self.of(name, function)(coming, rows, *args, **kwargs)

        return noted


def calls_of(layout: dict[str, Any], packs: list[TestPack], late: bool) -> list[str]:
    """What a step calls; runs on a rank of the pool."""
    calls = Calls()
    at_once = mock.patch.object(GroupedExperts, "matrices", lambda _: (None, None))
    added = experts.add_grouped_product_
    with (
        nullcontext() if late else at_once,
        mock.patch.object(dist, "all_to_all_single", calls.of_messages(dist.all_to_all_single)),
        mock.patch.object(F, "grouped_mm", calls.of("product", F.grouped_mm)),
        mock.patch.object(experts, "add_grouped_product_", calls.of("matrix", added)),
    ):
        backward(Layout(2, {"expert": 2, **layout}, Case(experts=EXPERTS)), packs)
    return calls.names


def in_words(text: str) -> list[str]:
    """Calls written as `2 few, product`."""
    words = []
    for each in text.split(", "):
        *times, name = each.split()
        words += [name] * int(times[0] if times else 1)
    return words


ORDERS = {
    # Numbers of experts, weights and, last, rows, for which no other message waits; products; results. Back: gradients of
    # results, products, gradients of weights and rows, beside which those of the matrices are made.
    "one part": (
        {},
        "2 few, rows, 3 awaited, 2 product, rows, awaited",
        "rows, awaited, 2 product, few, rows, 2 matrix, 2 awaited",
    ),
    # The second part's rows travel beside the first one's products, and the first one's results beside the second one's.
    "two parts": (
        {"expert_parts": 2},
        "2 few, rows, 2 few, rows, 3 awaited, 2 product, rows, 3 awaited, 2 product, rows, 2 awaited",
        "2 rows, awaited, 2 product, few, rows, awaited, 2 product, few, rows, 2 matrix, 4 awaited",
    ),
    # The second pass knows the experts, and needs no results.
    "again": (
        {"recompute": "full", "expert_parts": 2},
        "2 few, rows, 2 few, rows, 3 awaited, 2 product, rows, 3 awaited, 2 product, rows, 2 awaited",
        "few, rows, few, rows, 2 awaited, product, 2 awaited, product,"
        " 2 rows, awaited, 2 product, few, rows, awaited, 2 product, few, rows, 2 matrix, 4 awaited",
    ),
}


LAYERS, MICRO_BATCHES = 4, 2


@pytest.mark.parametrize("name", ORDERS)
def test_rows_and_gradients_travel_beside_products(name: str, pool: RankPool) -> None:
    layout, forward, back = ORDERS[name]
    expected = (in_words(forward) * LAYERS + in_words(back) * LAYERS) * MICRO_BATCHES
    assert pool.run(2, calls_of, layout, packs_of("text")[:2], True) == [expected] * 2


def test_control_gradients_of_matrices_at_once(pool: RankPool) -> None:
    _, forward, _ = ORDERS["one part"]
    back = "rows, awaited, product, matrix, product, matrix, few, rows, 2 awaited"
    expected = (in_words(forward) * LAYERS + in_words(back) * LAYERS) * MICRO_BATCHES
    assert pool.run(2, calls_of, {}, packs_of("text")[:2], False) == [expected] * 2
