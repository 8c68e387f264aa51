"""How many tokens the experts get where it is stated. Reference: counts of the choice itself."""

import math

import pytest
import torch

from visionloom.forecast.trace.values import Routing

TOKENS, EXPERTS, EACH = 512, 64, 4


def loads(routing: Routing, experts: int = EXPERTS, each: int = EACH) -> torch.Tensor:
    """Tokens of each expert, of a choice in which no token has an expert twice."""
    choice = routing.choose(TOKENS, experts, each)
    assert choice.shape == (TOKENS, each)
    assert all(len(set(row)) == each for row in choice.tolist())
    return torch.bincount(choice.flatten(), minlength=experts)


@pytest.mark.parametrize("routing", [Routing(), Routing(1.0, 8), Routing(3.0, 1)])
@pytest.mark.parametrize(("experts", "each"), [(64, 4), (7, 3), (1, 1)])
def test_experts_have_as_much_to_do(routing: Routing, experts: int, each: int) -> None:
    """Without an imbalance, and where one rank has them all."""
    counts = loads(routing, experts, each)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("ranks", [2, 4, 16, 64])
@pytest.mark.parametrize("last", [False, True])
def test_one_rank_is_the_busiest(ranks: int, last: bool) -> None:
    """It has so many times the mean of a rank, however many experts are on it."""
    busiest = ranks - 1 if last else 0
    by_rank = loads(Routing(1.5, ranks, busiest)).view(ranks, -1).sum(1).tolist()
    assert by_rank.pop(busiest) == pytest.approx(1.5 * TOKENS * EACH / ranks, rel=0.01)
    assert max(by_rank) - min(by_rank) <= EXPERTS // ranks


def test_no_rank_has_more_than_there_is() -> None:
    counts = loads(Routing(1e9, 8))
    assert int(counts.sum()) == TOKENS * EACH
    assert int(counts[:8].sum()) == TOKENS * EACH, "eight experts can take four of each token"


@pytest.mark.parametrize("tokens", [8192, 8191, 8200])
def test_a_token_has_experts_of_as_many_ranks_as_by_chance(tokens: int) -> None:
    """Reference: a rank has none of a token's experts as often as a draw without putting back misses its 16 of 128."""
    experts, each, ranks = 128, 8, 8
    choice = Routing(1.0, ranks).choose(tokens, experts, each)
    homes = torch.zeros(tokens, ranks).scatter(1, choice // (experts // ranks), 1.0)
    others = experts - experts // ranks
    missed = math.comb(others, each) / math.comb(experts, each)
    assert float(homes.sum(1).mean()) == pytest.approx(ranks * (1 - missed), rel=0.01)
    assert homes.mean(0).tolist() == pytest.approx([1 - missed] * ranks, rel=0.03)


def test_busy_experts_are_drawn_too() -> None:
    choice = Routing(1.5, 8).choose(8192, 128, 8).sort(1).values
    assert len(choice.unique(dim=0)) > 0.99 * len(choice)


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens_choose_too(tokens: int) -> None:
    assert Routing(1.0, 2).choose(tokens, 8, 2).shape == (tokens, 2)
