"""The packs of an imagined step: those of the run's own stream where its lengths are there, else of a mixture.

Reference: data/stream, whose batches of the same steps must be equal in everything but the contents of patches.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.train_stream import PackStream
from visionloom.forecast.packs import PackChoice, missing_lengths, packs_for
from visionloom.launch.configure import compose
from visionloom.parallel.share import Share
from visionloom.train.config import RunConfig
from visionloom.train.step_sums import StepCounts
from visionloom.train.stream_options import stream_options

RANKS = 2


def composed(*words: str, ranks: int = RANKS) -> RunConfig:
    config = compose(words, ranks)
    assert config is not None
    return config


@pytest.fixture
def config(demo_data: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The demo on two ranks, with its data."""
    monkeypatch.setenv("VISIONLOOM_DEMO_DATA", str(demo_data))
    steps = ("phases.long.steps=100", "phases.long.global_batch=4", "phases.long.micro_batch=2")
    return composed("+recipe=demo", *steps)


@pytest.fixture
def stream(config: RunConfig) -> PackStream:
    """The stream of the demo's phase of videos; opening it counts lengths."""
    return PackStream(stream_options(config, "long"))


def all_batches(stream: PackStream, share: Share) -> Iterator[PackedBatch]:
    """The micro-batches of all data ranks in the steps that a forecast looks at: the phase's 100 of 4 packs."""
    for step in range(100):
        for rank in range(RANKS):
            mine = dataclasses.replace(share, data_rank=rank, data_size=RANKS)
            yield from stream.micro_batches(step, mine, 2)


def equal(one: PackedBatch, other: PackedBatch) -> bool:
    """Whether two batches are the same but for what their patches show."""
    for field in dataclasses.fields(PackedBatch):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if field.name == "patches":
            mine, theirs = mine.shape, theirs.shape
        same = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        if not same:
            return False
    return True


@pytest.mark.parametrize("encoder_rank", [-1, 0, 2])
def test_packs_are_those_of_the_stream(
    config: RunConfig, stream: PackStream, encoder_rank: int
) -> None:
    share = Share(encoder_rank=encoder_rank, encoder_ranks=3)
    imagined = packs_for(config, "long", RANKS, [PackChoice.MEAN])[PackChoice.MEAN]
    assert "of the first 200 micro-batches of the phase's own plan" in imagined.assumed
    batch = imagined.batch(share)
    assert any(equal(batch, real) for real in all_batches(stream, share))


def test_the_chosen_ones_are_mean_and_worst(config: RunConfig, stream: PackStream) -> None:
    """By the cost of the run's own plan, and by counts of the run's own batches."""
    cost = stream.plan.cost
    real = list(all_batches(stream, Share(encoder_rank=-1, encoder_ranks=1)))
    chosen = packs_for(config, "long", RANKS, list(PackChoice))
    counts = {choice: packs.counts for choice, packs in chosen.items()}
    work = {
        choice: torch.tensor([c.tokens, c.token_pairs, c.patches, c.patch_pairs]).numpy()
        for choice, c in counts.items()
    }
    mean_cost = sum(pack.cost for step in range(100) for pack in stream.plan.step(step)) / len(real)
    costs = {choice: float(cost.of(row)) for choice, row in work.items()}
    print({choice.name: f"{value / mean_cost:.3f} of the mean" for choice, value in costs.items()})
    assert costs[PackChoice.MEAN] == pytest.approx(mean_cost, rel=0.02)
    each = [StepCounts.of([batch], 2) for batch in real]
    rows = [[c.tokens, c.token_pairs, c.patches, c.patch_pairs] for c in each]
    worst = max(float(cost.of(np.array(row))) for row in rows) / mean_cost
    assert worst > 1.02
    assert f"has {worst:.2f} times the mean work" in chosen[PackChoice.MEAN].assumed
    assert counts[PackChoice.PATCHES].patches == max(batch.patch_count for batch in real)
    most = max(batch.supervised_tokens for batch in real)
    # A table counts the supervised tokens of a sample, a batch those that another token predicts.
    assert counts[PackChoice.SUPERVISED].supervised_tokens == pytest.approx(most, rel=0.01)


def test_nothing_is_counted_for_a_forecast(config: RunConfig, tmp_path: Path) -> None:
    config.data.cache = str(tmp_path)
    packs = packs_for(config, "long", RANKS, [PackChoice.MEAN])[PackChoice.MEAN]
    assert packs.assumed.startswith("the mean of the first 200 micro-batches of a stated mixture")
    assert "has no lengths yet: run data.py lengths" in packs.assumed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.tokenizer=/nowhere"], r"^no folder data\.tokenizer=/nowhere$"),
        (["data.datasets.text.path=/none"], r"^no folder data\.datasets\.text\.path=/none$"),
        (["data.datasets.text.path=https://host/x"], r"^data\.datasets\.text\.path=\S+ is remote$"),
    ],
)
def test_what_is_not_there_is_named(stream: PackStream, words: list[str], expected: str) -> None:
    lacking = missing_lengths(stream_options(composed("+recipe=demo", *words), "long"))
    assert re.match(expected, lacking)


def test_encoder_ranks_share_the_pictures_of_a_long_pack() -> None:
    """262,144 tokens, dealt to 8 encoder ranks: each batch has the patches that the deal gives its rank."""
    words = ["+recipe=full/qwen3vl_8b", "phases.finetune.sequence_length=262144"]
    packs = packs_for(composed(*words, ranks=8), "finetune", 8, [PackChoice.MEAN])[PackChoice.MEAN]
    dealt = packs.encoder_patches(8)
    counts = packs.counts
    assert sum(dealt) == counts.patches == 4 * counts.visual_tokens
    assert max(dealt) < 1.5 * min(dealt), "videos are cut into runs of at most half a fair share"
    for rank in (0, 7):
        batch = packs.batch(Share(encoder_rank=rank, encoder_ranks=8))
        assert batch.patches.shape == (dealt[rank], 1536)
        assert batch.patches.dtype == torch.uint8
        assert int(batch.cu_seqlens[-1]) == batch.input_ids.numel() == 262_144
        assert batch.visual_rows.numel() == counts.visual_tokens
        assert batch.supervised_tokens == counts.supervised_tokens
