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
            self.names.append("begun" if kwargs.get("async_op") else name)
            result = function(*args, **kwargs)
            if kwargs.get("async_op"):
                result = mock.Mock(wait=self.of("awaited", result.wait))
            return result

        return noted


def order_of_backward(recompute: str, packs: list[TestPack], late: bool) -> list[str]:
    """What a step of one micro-batch calls, by forward and backward pass; runs on a rank of the pool."""
    calls = Calls()
    layout = Layout(2, {"expert": 2, "recompute": recompute}, Case(experts=EXPERTS))
    at_once = mock.patch.object(GroupedExperts, "matrices", lambda _: (None, None))
    added = experts.add_grouped_product_
    with (
        nullcontext() if late else at_once,
        mock.patch.object(dist, "all_to_all_single", calls.of("sent", dist.all_to_all_single)),
        mock.patch.object(F, "grouped_mm", calls.of("by rows", F.grouped_mm)),
        mock.patch.object(experts, "add_grouped_product_", calls.of("product", added)),
    ):
        backward(layout, packs)
    return calls.names


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gradients_of_experts_are_made_while_those_of_rows_travel(
    recompute: str, pool: RankPool
) -> None:
    """Of each layer, the last ones of a step: rows' gradients begin to travel, two products, and the wait for both messages.

    The control makes the matrices' gradients at once.
    """
    packs = packs_of("text")[:2]
    end = ["begun", "begun", "product", "product", "awaited", "awaited"]
    for names in pool.run(2, order_of_backward, recompute, packs, True):
        assert names[-6:] == end
        layers = names.count("begun") // 2
        assert sum(names[place : place + 6] == end for place in range(len(names))) == layers > 1
    for names in pool.run(2, order_of_backward, recompute, packs, False):
        assert names[-4:] == ["begun", "begun", "awaited", "awaited"]
