"""DeepSpeed's ZeRO as the engine of real runs. Reference: the same runs on Megatron-core's, step for step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from visionloom.launch.configure import compose
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.faulty import pretrain_with
from visionloom.tests.train.runs import metrics, run_config, run_words
from visionloom.tests.train.test_early_end import exact, stopped
from visionloom.tests.train.test_layouts import train
from visionloom.tests.train.test_resume import checkpoint_tensors
from visionloom.train.config import RunConfig

STEPS = 12
STAGES = {
    "1": ["stage=1"],
    "2": ["stage=2"],
    "3": ["stage=3"],
    "1 offloaded": ["stage=1", "offload_optimizer=cpu"],
    "2 offloaded": ["stage=2", "offload_optimizer=cpu"],
    "3 offloaded": ["stage=3", "offload_optimizer=cpu", "offload_parameters=cpu"],
    "3 in small buckets": ["stage=3", "bucket_bytes=65536"],
}
QUICK = ("2", "3")
RunAs = Callable[..., Path]
"""Runs a model with words of its own on some ranks and returns its folder; each once for the file."""


def words_of(stage: str) -> list[str]:
    return ["parallel.engine=deepspeed", *(f"parallel.zero.{word}" for word in STAGES[stage])]


def stages(*quick: str) -> list[Any]:
    """All stages; those that are not quick are left to make proofs."""
    marks = {name: () if name in quick else pytest.mark.long for name in STAGES}
    return [pytest.param(name, marks=marks[name]) for name in STAGES]


def agree(ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    """Losses, norms, rates and data of two runs."""
    for own, other in zip(exact(ours), exact(theirs), strict=True):
        step, loss, by_source, norm, *rest = own
        assert loss == pytest.approx(other[1], rel=tolerance), step
        assert by_source == pytest.approx(other[2], rel=tolerance), step
        assert norm == pytest.approx(other[3], rel=tolerance), step
        assert rest == other[4:]


def weights_agree(pool: RankPool, ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    """All tensors of the last checkpoints: weights, master copies and moments."""
    own, other = (pool.run(1, checkpoint_tensors, each)[0] for each in (ours, theirs))
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        error = (tensor - other[name]).norm() / other[name].norm().clamp_min(1e-12)
        assert error <= tolerance, (name, float(error))


def stopped_anew(config: RunConfig, ranks: list[int], step: int) -> str:
    """As `stopped`, with DeepSpeed's numbers from 0: some ranks of the pool have had models before, and others none."""
    from deepspeed import zero
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    (count,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    count[0] = zero.Init.param_id = 0
    return stopped(config, ranks, step)


@pytest.fixture(scope="module")
def run_as(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunAs:
    known: dict[tuple[Any, ...], Path] = {}

    def once(ranks: int, *words: str) -> Path:
        if (ranks, *words) not in known:
            folder = tmp_path_factory.mktemp("run")
            config = run_config(demo_data, folder, STEPS, ranks, *words)
            assert pool.run(ranks, stopped_anew, config, [], 0) == ["done"] * ranks
            known[(ranks, *words)] = folder
        return known[(ranks, *words)]

    return once


@pytest.mark.parametrize("stage", stages(*QUICK))
def test_steps_are_megatrons(stage: str, run_as: RunAs, pool: RankPool) -> None:
    """Packs of text and pictures, dealt to two ranks."""
    ours, theirs = run_as(2, *words_of(stage)), run_as(2)
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)


@pytest.mark.parametrize("stage", stages("3"))
def test_a_mixture(stage: str, run_as: RunAs, pool: RankPool) -> None:
    ours, theirs = run_as(2, "model=tiny_moe", *words_of(stage)), run_as(2, "model=tiny_moe")
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)


@pytest.mark.parametrize("stage", stages("3"))
def test_frozen_groups_and_recomputation(stage: str, run_as: RunAs, pool: RankPool) -> None:
    words = ["phases.multimodal.trainable=[merger]", "parallel.recompute=full"]
    ours, theirs = run_as(2, *words, *words_of(stage)), run_as(2, *words)
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)


@pytest.mark.parametrize("stage", stages("3"))
def test_adapters(stage: str, run_as: RunAs, pool: RankPool) -> None:
    """With mergers that train whole; the weights under the adapters are in no checkpoint."""
    (base,) = (run_as(2) / "checkpoints" / "multimodal").iterdir()
    words = [
        f"init.checkpoint={base}",
        "lora.rank=4",
        "lora.groups=[language]",
        "lora.full=[merger]",
    ]
    ours, theirs = run_as(2, *words, *words_of(stage)), run_as(2, *words)
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)


@pytest.mark.parametrize("stage", stages("3"))
def test_bf16(stage: str, run_as: RunAs, pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    """As near to Megatron-core's as two runs in bf16 are, see tests/train/test_bf16.py, and resumed bit for bit."""
    words = ["run.precision=bf16", *words_of(stage)]
    agree(run_as(2, *words), run_as(2, "run.precision=bf16"), 0.01)
    config = run_config(demo_data, tmp_path, STEPS, 2, *words)
    pool.run(2, stopped_anew, config, [1], 5)
    pool.run(2, train, config)
    assert exact(tmp_path) == exact(run_as(2, *words))


@pytest.mark.long
@pytest.mark.parametrize("stage", stages())
def test_tensor_ranks(stage: str, run_as: RunAs, pool: RankPool) -> None:
    words = ["parallel.tensor=2", "parallel.sequence=false"]
    ours, theirs = run_as(4, *words, *words_of(stage)), run_as(4, *words)
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)


@pytest.mark.parametrize("stage", stages("3"))
def test_an_interrupted_run_goes_on_exactly(
    stage: str, run_as: RunAs, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    words = words_of(stage)
    config = run_config(demo_data, tmp_path, STEPS, 2, *words)
    assert pool.run(2, stopped, config, [1], 5)[0].startswith("stopped by SIGTERM after step 6")
    pool.run(2, train, config)
    assert exact(tmp_path) == exact(run_as(2, *words))


@pytest.mark.parametrize("stage", stages("3"))
def test_from_megatron_and_back(
    stage: str, run_as: RunAs, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """In the middle of a phase, with moments and count of updates, and on other numbers of ranks."""
    small = "phases.multimodal.micro_batch=1"
    parts = ((1, [], 3), (2, words_of(stage), 6), (4, words_of(stage), 8), (2, [], 0))
    for ranks, words, step in parts:
        config = run_config(demo_data, tmp_path, STEPS, ranks, small, *words)
        pool.run(ranks, stopped_anew, config, [0] if step else [], step)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [4, 7, 9]
    agree(tmp_path, run_as(2, small))
    weights_agree(pool, tmp_path, run_as(2, small))


@pytest.mark.parametrize("stage", stages("3"))
def test_a_bad_step_changes_nothing(
    stage: str, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """Infinite weights in the third step on one rank."""
    for name, words in (("ours", words_of(stage)), ("theirs", [])):
        config = run_config(demo_data, tmp_path / name, 6, 2, *words)
        pool.run(2, pretrain_with, config, "nan", 3, 3, 1)
    lines = metrics(tmp_path / "ours")
    assert [line["skipped"] for line in lines] == [False, False, True, False, False, False]
    for line, other in zip(lines, metrics(tmp_path / "theirs"), strict=True):
        if not line["skipped"]:
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    weights_agree(pool, tmp_path / "ours", tmp_path / "theirs")


def bytes_of_a_rank(data: Path, folder: Path, ranks: int, words: list[str]) -> int:
    """Bytes of weights, master copies and moments that a rank holds for good (runs in the pool)."""
    from visionloom.parallel import topology as topologies
    from visionloom.train import build
    from visionloom.train.engines.engine import WEIGHT

    config = run_config(data, folder, 4, ranks, "phases.multimodal.micro_batch=1", *words)
    topology = build.open_topology(config)
    stream = build.build_stream(config, "multimodal", folder, topology)
    parts = build.build_model(config, topology, drawn=True)
    trainer = build.build_trainer(config, "multimodal", topology, parts, stream)
    held = sum(
        tensor.nbytes for owned in trainer.engine.owned() for tensor in owned.values.values()
    )
    if WEIGHT not in next(iter(trainer.engine.owned())).values:
        held += sum(parameter.nbytes for parameter in parts[0].parameters())
    # Nothing else is whole: what is left of a weight's memory is a placeholder.
    whole = sum(
        parameter.untyped_storage().nbytes()
        for parameter in parts[0].parameters()
        if not getattr(parameter, "ds_persist", False)
    )
    assert trainer.engine.has_whole_weights or whole <= 64 * len(list(parts[0].parameters()))
    trainer.engine.close()
    topologies.stop()
    return held


def test_memory_falls_as_one_over_the_ranks(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    sizes = {
        ranks: max(pool.run(ranks, bytes_of_a_rank, demo_data, tmp_path, ranks, words_of("3")))
        for ranks in (1, 2, 4)
    }
    # Norms and biases do not divide evenly.
    assert sizes[2] == pytest.approx(sizes[1] / 2, rel=0.02)
    assert sizes[4] == pytest.approx(sizes[1] / 4, rel=0.02)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.pipeline=2"], "leave out parallel.pipeline, or choose parallel.engine=megatron"),
        (["parallel.context=2"], "leave out parallel.context"),
        (["parallel.zero.offload_optimizer=nvme"], "needs parallel.zero.nvme_path"),
        (["parallel.zero.stage=2", "parallel.zero.offload_parameters=cpu"], "needs parallel.zero.stage=3"),
        (["optim=muon"], "choose optim=adamw"),
        (["model=tiny_moe", "parallel.tensor=2"], "does not cut a mixture of experts"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_one_line(
    words: list[str], said: str, demo_data: Path, tmp_path: Path
) -> None:
    from visionloom.common.errors import UserError

    with pytest.raises(UserError, match=said):
        compose([*run_words(demo_data, tmp_path, 1), "parallel.engine=deepspeed", *words], 2)


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from visionloom.common.errors import UserError
    from visionloom.train.engines.zero import import_deepspeed

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'visionloom\[deepspeed\]'"):
        import_deepspeed(torch.device("cpu"))
