"""A phase with rewards in several layouts: the same answers, losses and gradients. Reference: one process."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from visionloom.tests.ranks import RankPool
from visionloom.tests.train.reinforcement.runs import drawn, rl_words
from visionloom.tests.train.runs import configured, metrics
from visionloom.tests.train.test_layouts import train

STEPS = 4
COMMON = ("data.sample_token_multiple=4",)
RL = ",updates:2,policy:{kl:0.05}"
GSPO = ",updates:2,policy:{algorithm:gspo,clip_low:0.01,clip_high:0.01}"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "data 2": (2, []),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "context 2": (2, ["parallel.context=2"]),
    "pipeline 2": (2, ["parallel.pipeline=2", "parallel.pipeline_layout=Et|tttL"]),
    "tensor 2 x context 2": (4, ["parallel.tensor=2", "parallel.context=2"]),
    "packs of one sample": (1, ["data.max_samples_per_pack=1"]),
    "pipeline 2 x data 2": (4, ["parallel.pipeline=2", "parallel.pipeline_layout=Et|tttL"]),
}
QUICK = ("data 2", "context 2")
COMPARED = ("loss", "grad_norm", "kl", "entropy", "log_probability_change", "gradient_share")


@pytest.fixture(scope="module")
def alone(
    pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Runs of one process, by their rl section."""

    @cache
    def run(rl: str) -> Path:
        folder = tmp_path_factory.mktemp("alone")
        words = rl_words(demo_data, folder, STEPS, *COMMON, rl=rl)
        pool.run(1, train, configured(words, 1))
        return folder

    return run


def assert_same(folder: Path, reference: Path) -> None:
    """Compare the answers, and losses and gradients of every step."""
    assert drawn(folder) == drawn(reference)
    for own, expected in zip(metrics(folder), metrics(reference), strict=True):
        for name in COMPARED:
            assert own[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
        # Between what generates and what trains there is rounding alone.
        for line in (own, expected):
            if rollout := line.get("rollout"):
                assert rollout["log_probability_apart_most"] < 1e-5
        assert ("rollout" in own) == ("rollout" in expected)
    assert "rollout" in metrics(folder)[0]


CASES = [
    *(pytest.param(name, RL, marks=() if name in QUICK else pytest.mark.long) for name in LAYOUTS),
    # The sums over an answer's tokens are those of context ranks: no other axis has a part in them.
    pytest.param("tensor 2 x context 2", GSPO, marks=pytest.mark.long),
    pytest.param("pipeline 2 x data 2", GSPO, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("layout", "rl"), CASES)
def test_a_layout_trains_as_one_process(
    layout: str,
    rl: str,
    alone: Callable[[str], Path],
    pool: RankPool,
    demo_data: Path,
    tmp_path: Path,
) -> None:
    ranks, words = LAYOUTS[layout]
    pool.run(
        ranks,
        train,
        configured(rl_words(demo_data, tmp_path, STEPS, *COMMON, *words, rl=rl), ranks),
    )
    assert_same(tmp_path, alone(rl))


@pytest.mark.long
def test_a_mixture_with_experts_on_ranks_of_their_own(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    for ranks, words in ((1, []), (2, ["parallel.expert=2"])):
        folder = tmp_path / str(ranks)
        own = rl_words(demo_data, folder, STEPS, "model=tiny_moe", *COMMON, *words, rl=RL)
        pool.run(ranks, train, configured(own, ranks))
    assert_same(tmp_path / "2", tmp_path / "1")
