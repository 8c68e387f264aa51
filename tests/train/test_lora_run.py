"""Runs that train adapters alone: what they save, that they resume exactly in any layout, and what is exported.

Reference: an uninterrupted run; peft on transformers' model.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from visionloom.model.trainable import is_adapter
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config
from visionloom.train.checkpoint.stored import StoredWeights
from visionloom.train.config import RunConfig

LORA = {
    "tiny": ("lora.groups=[language]", "lora.full=[vision,merger]"),
    "tiny_moe": ("lora.groups=[vision,merger,language]",),
}
"""Beside a tower and mergers that train themselves, and alone."""
STEPS, HALF = 6, 3


def train(config: RunConfig) -> None:
    """Runs on every rank of the pool."""
    from visionloom.train.run import pretrain

    pretrain(config)


def folder_of(run: Path, steps: int) -> Path:
    return run / "checkpoints" / "multimodal" / f"step-{steps:08d}"


@pytest.fixture(scope="module", params=["tiny", "tiny_moe"])
def base(
    request: pytest.FixtureRequest,
    pool: RankPool,
    demo_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A checkpoint of whole weights, of a dense model and a mixture."""
    run = tmp_path_factory.mktemp("base")
    pool.run(
        1,
        train,
        run_config(
            demo_data, run, 1, 1, f"model={request.param}", "phases.multimodal.warmup_steps=0"
        ),
    )
    return folder_of(run, 1)


def words(base: Path, *more: str) -> list[str]:
    model = json.loads((base / "state.json").read_text())["model"]["name"]
    start = [f"model={model}", f"init.checkpoint={base}", "lora.rank=8", "checkpoint.every_steps=0"]
    return [*start, *LORA[model], *more]


@pytest.fixture(scope="module")
def whole(
    base: Path, pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """An uninterrupted run on one process with a checkpoint half-way, and its base."""
    run = tmp_path_factory.mktemp("whole")
    pool.run(
        1,
        train,
        run_config(demo_data, run, STEPS, 1, *words(base), f"checkpoint.every_steps={HALF}"),
    )
    return run, base


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.distcp"))


def trains(name: str, base: Path) -> bool:
    """Whether a tensor of a checkpoint is an adapter, or a weight that trains with them."""
    is_whole = "tiny_moe" not in words(base)[0] and name.startswith("visual.")
    return is_adapter(name) or is_whole


def test_a_checkpoint_holds_what_trains_alone(whole: tuple[Path, Path]) -> None:
    run, base = whole
    stored = StoredWeights(folder_of(run, STEPS)).tensors
    weights = [name for name in stored if not name.startswith("optimizer.")]
    kept = [name for name in weights if not name.endswith(".router.load")]
    assert kept and all(trains(name, base) for name in kept)
    assert any(is_adapter(name) for name in kept)
    # The tower and the mergers of the tiny model are a fifth of it.
    assert size(folder_of(run, STEPS)) < size(base) * 0.6
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize(
    "axis",
    [
        "",
        pytest.param("tensor", marks=pytest.mark.long),
        pytest.param("pipeline", marks=pytest.mark.long),
        pytest.param("expert", marks=pytest.mark.long),
    ],
)
def test_it_resumes_in_another_layout(
    axis: str, whole: tuple[Path, Path], pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    run, base = whole
    ranks, layout = (2, [f"parallel.{axis}=2"]) if axis else (1, [])
    if axis == "expert" and "tiny_moe" not in words(base)[0]:
        pytest.skip("no experts")
    resumed = tmp_path / "run"
    half = folder_of(resumed, HALF)
    half.parent.mkdir(parents=True)
    half.symlink_to(folder_of(run, HALF))
    (resumed / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
    pool.run(ranks, train, run_config(demo_data, resumed, STEPS, ranks, *words(base), *layout))
    events = [json.loads(line) for line in (resumed / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [HALF]
    expected, found = ([line["loss"] for line in metrics(folder)] for folder in (run, resumed))
    assert found == (expected if not axis else pytest.approx(expected, abs=1e-5))
    for name in (n for n in StoredWeights(folder_of(run, STEPS)).tensors if trains(n, base)):
        if not name.startswith("optimizer."):
            one, other = (
                StoredWeights(folder_of(folder, STEPS)).parameter(name) for folder in (run, resumed)
            )
            assert float((one - other).abs().max()) <= (1e-4 if axis else 0.0), name


def export(run: Path, base: Path, folder: Path) -> None:
    """The peft folder, the merged model and the base, as the command makes them; runs on a rank of the pool."""
    from visionloom.launch.convert import main

    source = f"checkpoint={folder_of(run, STEPS)}"
    assert main(["adapter", source, f"out={folder}/adapter", "base=tiny"]) == 0
    assert main(["adapter", source, f"out={folder}/merged", f"weights={base}"]) == 0
    assert main(["export", f"checkpoint={base}", f"out={folder}/base"]) == 0
    assert main(["adapter", source, f"out={folder}/again", f"weights={folder}/base"]) == 0


def test_exports_load_in_peft_and_transformers(
    whole: tuple[Path, Path], pool: RankPool, tmp_path: Path
) -> None:
    """peft on the exported base gives the merged export's logits, and its own merging the same weights."""
    run, base = whole
    pool.run(1, export, run, base, tmp_path)
    plain, merged, again = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("base", "merged", "again")
    )
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits for model in (plain, merged))
        tuned = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        assert float((tuned(input_ids=ids).logits - after).abs().max()) <= 1e-5
    assert float((before - after).abs().max()) > 1e-3
    theirs = tuned.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        assert float((theirs[name] - tensor).abs().max()) <= 1e-6, name
        assert torch.equal(again.state_dict()[name], tensor), name
