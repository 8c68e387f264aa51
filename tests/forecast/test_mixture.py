"""A stated mixture: lengths as measured mixtures have them, samples that the stream could have encoded.

Reference: the table of the mixtures by which this project measures packing (means, long tails, fill).
"""

from typing import Final

import numpy as np
import pytest

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig
from visionloom.data.plan.lengths import row_of
from visionloom.data.plan.open import StreamOptions
from visionloom.forecast.mixture import MERGED, mixture_for, mixtures
from visionloom.forecast.mixture_stream import MixtureStream

EXPECTED: Final = {
    # mean tokens, 99th percentile, visual share, share of tokens in samples longer than a pack, fill of packs
    8_192: (1_656, 13_700, 0.63, 0.228, 0.9983),
    32_768: (2_191, 18_500, 0.68, 0.042, 0.9990),
    262_144: (10_099, 154_000, 0.55, 0.0, 0.9993),
}


def options(sequence_length: int, global_batch: int = 64, multiple: int = 1) -> StreamOptions:
    data = DataConfig(sample_token_multiple=multiple)
    return StreamOptions(data, "phase", sequence_length, global_batch, {}, "sqrt", 1)


@pytest.mark.parametrize("length", EXPECTED)
def test_lengths_are_those_of_the_measured_mixtures(length: int) -> None:
    mean, tail, visual, too_long, _ = EXPECTED[length]
    lengths = mixture_for(length).draw(20_000).lengths
    tokens = lengths["tokens"].astype(np.int64)
    visual_tokens = lengths["patches"].astype(np.int64) // MERGED
    measured = (
        tokens.mean(),
        float(np.percentile(tokens, 99)),
        visual_tokens.sum() / tokens.sum(),
        tokens[tokens > length].sum() / tokens.sum(),
    )
    print(f"{length:,}: mean, 99th percentile, visual, too long:", *(f"{x:,.3f}" for x in measured))
    assert measured[0] == pytest.approx(mean, rel=0.08)
    assert measured[1] == pytest.approx(tail, rel=0.2)
    assert measured[2] == pytest.approx(visual, abs=0.05)
    assert measured[3] == pytest.approx(too_long, abs=0.07)


@pytest.mark.parametrize("length", EXPECTED)
def test_packs_are_as_full_as_measured(length: int) -> None:
    stream = MixtureStream(options(length))
    block = stream.plan.block(0)
    packs = len(block) - 1  # the last of a block is not full
    tokens = block.tokens[: block.borders[packs]].sum(dtype=np.int64)
    fill, samples = tokens / packs / length, block.borders[packs] / packs
    print(f"{length:,}: fill {fill:.4f}, {samples:.1f} samples a pack, {packs} packs")
    assert fill == pytest.approx(EXPECTED[length][4], abs=0.002)
    # The mean sample that fits says how many share a pack.
    fitting = stream.plan.entries[0].parts
    mean = fitting.total("tokens") / len(fitting)
    assert samples == pytest.approx(length / mean, rel=0.1)


@pytest.mark.parametrize("length", [512, *EXPECTED])
def test_a_sample_is_as_long_as_its_row_says(length: int) -> None:
    samples = mixture_for(length).draw(300, seed=3)
    assert {0, 1} == set(samples.is_video.tolist())
    for number, row in enumerate(samples.lengths):
        encoded = samples.encoded(number)
        assert row_of(encoded) == row.item()
        assert len(encoded.visual_positions) * MERGED == encoded.patch_count
        assert (encoded.grids[:, 1:] % 2 == 0).all()
        assert len(encoded.media) == len(encoded.grids)


def test_the_mixture_follows_the_length_of_a_pack() -> None:
    known = mixtures()
    assert mixture_for(16_384) is known[8_192]
    assert mixture_for(10**6) is known[262_144]
    short = mixture_for(1_024).draw(20_000).lengths["tokens"]
    # An eighth of the pack, an eighth of the lengths, apart from the marks that all samples have.
    expected = (known[8_192].draw(20_000).lengths["tokens"].mean() - 8) / 8 + 8
    assert short.mean() == pytest.approx(expected, rel=0.03)


def test_samples_take_up_the_multiple_that_context_ranks_need() -> None:
    stream = MixtureStream(options(8_192, multiple=16))
    batch = stream.samples_of(stream.plan.step(0)[:20])
    for samples in batch:
        assert sum(-(-len(sample.input_ids) // 16) * 16 for sample in samples) <= 8_192


def test_a_pack_without_room_for_any_sample_is_refused() -> None:
    with pytest.raises(UserError, match=r"^phases\.phase\.sequence_length=4 is too short"):
        MixtureStream(options(4))
