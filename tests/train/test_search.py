"""Random small configurations end in one line or in a finite optimizer step, on one process and on two.

Reference: the dependencies themselves, which raise where they cannot; each seed is one configuration. More seeds: SEARCH_SEEDS.
"""

import math
import os

import pytest

from visionloom.data.encode.geometry import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE
from visionloom.model.config import PICTURES
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.search import Draw, draw, step
from visionloom.train.phase.validation import held_out

SEEDS = int(os.environ.get("SEARCH_SEEDS", "8"))


def outcome(pool: RankPool, drawn: Draw) -> str:
    """`refused` or `trained`; RankFailed with the traceback if a rank raises."""
    found = drawn.config().all_problems(drawn.ranks)
    if found:
        assert all(
            "\n" not in line
            and any(
                word in line
                for word in ("model.", "parallel.", "lora.", "phases.", "run.", "optim.", "data.")
            )
            for line in found
        ), found
        return "refused"
    for loss, gradient, finite in pool.run(drawn.ranks, step, drawn):
        assert math.isfinite(loss) and math.isfinite(gradient) and finite, drawn
    return "trained"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_random_configurations(ranks: int, pool: RankPool) -> None:
    told = [outcome(pool, draw(seed, ranks)) for seed in range(SEEDS)]
    assert {"refused", "trained"} == set(told)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, {"model.text.experts": 3, "model.text.experts_per_token": 1}),
        (
            1,
            {
                "model.text.experts": 1,
                "model.text.experts_per_token": 1,
                "run.precision": "bf16",
                "lora.rank": 8,
            },
        ),
        (
            1,
            {
                "model.text.experts": 4,
                "model.text.hidden_size": 36,
                "model.text.expert_ffn_hidden_size": 12,
            },
        ),
        (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 1}),
        pytest.param(
            2,
            {
                "model.text.experts": 4,
                "model.text.expert_ffn_hidden_size": 8,
                "parallel.expert_tensor": 2,
            },
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_least_that_dependencies_take_trains(
    ranks: int, words: dict[str, object], pool: RankPool
) -> None:
    assert outcome(pool, Draw(ranks, words)) == "trained"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"model.text.experts": 4, "model.text.hidden_size": 34}, "model.text.hidden_size=34 must be a multiple of 4 in a mixture"),
        ({"model.text.experts": 4, "model.text.expert_ffn_hidden_size": 6}, "model.text.expert_ffn_hidden_size=6 must be a multiple of 4"),
        ({"model.text.experts": 4, "model.text.expert_ffn_hidden_size": 12, "run.precision": "bf16"}, "hidden_size=12 must be a multiple of 8"),
        ({"model.text.experts": 4, "model.text.expert_ffn_hidden_size": 12, "run.precision": "auto", "run.device": "auto"}, "multiple of 8"),
        ({"model.vision.hidden_size": 18}, "model.vision.hidden_size=18 must be a multiple of 4 x heads=8"),
        ({"model.vision.deepstack_layers": [2, 0]}, "model.vision.deepstack_layers=[2, 0] must increase"),
        ({"model.vision.deepstack_layers": [1, 1]}, "model.vision.deepstack_layers=[1, 1] must increase"),
        ({"model.vision.patch_size": 14}, "model.vision.patch_size=14 must be 16"),
        ({"model.text.mrope_section": [4]}, "model.text.mrope_section=[4] must be three numbers"),
        ({"model.text.mrope_section": [5, -1, 0]}, "model.text.mrope_section=[5, -1, 0] must be three numbers"),
        ({"model.text.experts": -1}, "model.text.experts=-1 must be at least 0"),
        ({"model.text.rope_theta": 0.0}, "model.text.rope_theta=0 must be above 0 and at most 1e+12"),
        ({"model.text.norm_epsilon": -1.0}, "model.text.norm_epsilon=-1 must be above 0 and at most 1"),
        ({"optim.weight_decay": math.nan}, "optim.weight_decay=nan must be a finite number"),
        ({"optim.epsilon": 0.0}, "optim.epsilon=0 must be above 0"),
        ({"phases.p.lr": math.inf}, "phases.p.lr=inf must be a finite number"),
    ],
)  # fmt: skip
def test_what_they_do_not_take_is_one_line(words: dict[str, object], told: str) -> None:
    (line,) = Draw(1, words).config().all_problems(1)
    assert told in line


def test_experts_cut_over_ranks_need_rows_of_their_own() -> None:
    (line,) = (
        Draw(
            2,
            {
                "model.text.experts": 4,
                "model.text.expert_ffn_hidden_size": 12,
                "parallel.expert_tensor": 2,
            },
        )
        .config()
        .all_problems(2)
    )
    assert (
        "model.text.expert_ffn_hidden_size=12 must be a multiple of 4 x parallel.expert_tensor 2"
        in line
    )


def test_pictures_are_cut_as_the_data_cuts_them() -> None:
    sizes = (
        PICTURES["patch_size"],
        PICTURES["temporal_patch_size"],
        PICTURES["spatial_merge_size"],
    )
    assert sizes == (PATCH_SIZE, TEMPORAL_PATCH_SIZE, MERGE_SIZE)


def test_held_out_packs_fit_every_phases_layout() -> None:
    """A phase in a layout of its own is evaluated on the longest sequence of all phases."""
    config = Draw(2, {"phases.p.sequence_length": 89}).config()
    assert held_out(config).pack_length(ParallelConfig()) == 89
    assert held_out(config).pack_length(ParallelConfig(tensor=2)) == 90
    assert held_out(config).pack_length(ParallelConfig(tensor=2, context=2)) == 92


def test_the_layout_of_evaluation_cuts_samples_too() -> None:
    """All phases have layouts of their own: evaluation takes the run's."""
    config = Draw(2, {"parallel.context": 2, "phases.p.parallel": ParallelConfig()}).config()
    (line,) = config.all_problems(2)
    assert "data.sample_token_multiple=1 must be a multiple of 4" in line
