"""Data from which nothing can be learned, met by a run: refused before its first step, or told."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.data.shards.sample import Message, Sample, Text
from visionloom.data.shards.write import Pair, write_shards
from visionloom.parallel import topology as topologies
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config
from visionloom.train.config import RunConfig
from visionloom.train.run import pretrain

SHARE = (0.0, 1.0)
"""Losses of the answers of the dataset that is partly without."""


def answered(number: int, loss: float) -> Pair:
    messages = (Message("user", (Text("say one"),)), Message("assistant", (Text("one"),), loss))
    return Sample(f"chat:{number}", "chat", messages), {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("losses")
    write_shards(folder / "silent", "silent", [answered(number, 0.0) for number in range(12)])
    write_shards(
        folder / "partly",
        "partly",
        [answered(number, SHARE[number % 4 > 0]) for number in range(12)],
    )
    return folder


def trained(config: RunConfig) -> str:
    """What a run says, or the fault that ends it."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            pretrain(config)
    except UserError as error:
        topologies.stop()
        return f"error: {error}"
    return shown.getvalue()


def test_a_later_phase_without_a_loss_is_refused_before_the_first_step(
    demo_data: Path, folders: Path, tmp_path: Path, pool: RankPool
) -> None:
    config = run_config(demo_data, tmp_path, 4, 1, f"+data.datasets.silent.path={folders}/silent")
    config.phases["later"] = replace(
        config.phases["multimodal"], mixture={"silent": 1.0, "captions": 1.0}
    )
    (said,) = pool.run(1, trained, config)
    assert said.startswith(
        f"error: data.datasets.silent ({folders}/silent): none of its 12 samples has a supervised token"
    )
    assert not (tmp_path / "metrics.jsonl").exists() or not metrics(tmp_path)


def test_samples_and_held_out_data_without_a_loss_are_told(
    demo_data: Path, folders: Path, tmp_path: Path, pool: RankPool
) -> None:
    words = [
        f"+data.datasets.partly.path={folders}/partly",
        f"+data.validation.silent.path={folders}/silent",
    ]
    config = run_config(
        demo_data,
        tmp_path,
        1,
        1,
        *words,
        "evaluation.phase_samples=4",
        "phases.multimodal.warmup_steps=0",
    )
    config.phases["multimodal"].mixture = {"partly": 1.0, "captions": 1.0}
    config.data.validation = {name: config.data.validation[name] for name in ("captions", "silent")}
    (said,) = pool.run(1, trained, config)
    assert "multimodal: 3 of the 12 samples of partly have no supervised token" in said
    assert (
        f"data.validation.silent ({folders}/silent): none of the 4 samples looked at has a supervised token"
        in said
    )
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["dataset"], e["samples"]) for e in events if e["event"] == "unsupervised"] == [
        ("partly", 3)
    ]
    losses = [event["loss"] for event in events if event["event"] == "validation"]
    assert [set(loss) for loss in losses] == [{"captions"}, {"captions"}]
