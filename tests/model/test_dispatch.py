"""Rows on their way to the experts of other ranks. References: the sets of each token's experts, and the order of calls."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from visionloom.model.dispatch import Dispatch, ExpertGroups
from visionloom.model.experts import Matrix, grouped_linear
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.ranks import RankPool

TOKENS, EXPERTS, EACH, WIDTH = 40, 8, 3, 8


def groups_of(parallel: ParallelConfig) -> ExpertGroups:
    """The ranks that share the experts; runs on a rank of the pool."""
    groups = topologies.start(parallel, torch.device("cpu")).groups
    return ExpertGroups(EXPERTS, groups.ep, groups.expt_tp, groups.tp_ep)


def choice_of(rank: int) -> Tensor:
    """The experts that the tokens of a rank choose, int32 [n, k]."""
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(TOKENS, EXPERTS, generator=generator).topk(EACH).indices.int()


def sizes(expert_tensor: int) -> tuple[list[int], int, list[list[float]]]:
    """Rows to each expert rank, rows of this rank's experts, and those rows with their weights; runs on a rank of the pool."""
    ranks = dist.get_world_size() // expert_tensor
    groups = groups_of(
        ParallelConfig(tensor=expert_tensor, expert=ranks, expert_tensor=expert_tensor)
    )
    rank = dist.get_rank()
    dispatch = Dispatch(choice_of(rank), groups)
    # What a row is of: the rank of its token, and the token's number.
    tokens = torch.tensor([[rank, token] for token in range(TOKENS)]).float()
    weights = rank + torch.arange(TOKENS * EACH).view(TOKENS, EACH) / (TOKENS * EACH)
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
        assert sum(sent) < TOKENS * EACH, "a token with two experts on a rank goes there once"

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


def order_of_backward(late: bool) -> list[str]:
    """What the backward pass of one expert layer calls; runs on a rank of the pool."""
    groups = groups_of(ParallelConfig(expert=2))
    weight = torch.randn(EXPERTS // 2, WIDTH, WIDTH, requires_grad=True)
    tokens = torch.randn(TOKENS, WIDTH, requires_grad=True)
    dispatch = Dispatch(choice_of(dist.get_rank()), groups)
    leaving = dispatch.leave(tokens, torch.ones(TOKENS, EACH))
    matrix = Matrix.taken(weight) if late else Matrix(weight)
    rows, _, ends = dispatch.arrive(leaving)
    output = dispatch.from_experts(grouped_linear(rows, matrix, ends))

    calls = Calls()
    with (
        mock.patch.object(dist, "all_to_all_single", calls.of("sent", dist.all_to_all_single)),
        mock.patch.object(F, "grouped_mm", calls.of("product", F.grouped_mm)),
    ):
        output.sum().backward()
    return calls.names


def test_gradients_of_experts_are_made_while_those_of_rows_travel(pool: RankPool) -> None:
    """The control makes them at once."""
    late = ["sent", "product", "begun", "product", "awaited"]
    at_once = ["sent", "product", "product", "begun", "awaited"]
    assert pool.run(2, order_of_backward, True) == [late, late]
    assert pool.run(2, order_of_backward, False) == [at_once, at_once]
