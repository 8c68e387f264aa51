"""PackedBatch: labels, weights, boundaries and rows. Reference: the samples it was packed from, token by token."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from visionloom.data.encode.encode import EncodedSample, encode, extend, prompt_of
from visionloom.data.encode.tokenizer import IMAGE, VIDEO, Tokenizer
from visionloom.data.shards.sample import Sample
from visionloom.data.stream.batch import IGNORED, PackedBatch, PackLayout, pack, pack_prompts
from visionloom.tests.data.samples import RULES, essay, film, picture_question

LENGTH = 160


def ready(sample: Sample, tokenizer: Tokenizer, source: str, width: int = 768) -> EncodedSample:
    encoded = encode(sample, tokenizer, RULES, source)
    rows = np.random.default_rng(0).integers(0, 256, (encoded.patch_count, width), np.uint8)
    return replace(encoded, patches=rows)


@pytest.fixture
def samples(tokenizer: Tokenizer) -> list[EncodedSample]:
    return [
        ready(picture_question(1, (32, 96))[0], tokenizer, "b"),
        ready(essay(2)[0], tokenizer, "a"),
        ready(film(3)[0], tokenizer, "b", width=1536),
    ]


@pytest.fixture
def batch(samples: list[EncodedSample], tokenizer: Tokenizer) -> PackedBatch:
    return pack(
        [samples[:2], samples[2:]], PackLayout(LENGTH, "sqrt", ("a", "b"), tokenizer.pad_id)
    )


def segments(batch: PackedBatch) -> list[slice]:
    borders = batch.cu_seqlens.tolist()
    return [slice(first, last) for first, last in pairwise(borders)]


def test_samples_lie_end_to_end_and_padding_apart(
    batch: PackedBatch, samples: list[EncodedSample], tokenizer: Tokenizer
) -> None:
    lengths = [len(sample.input_ids) for sample in samples]
    rest = [LENGTH - sum(lengths[:2]), LENGTH - lengths[2]]
    assert np.diff(batch.cu_seqlens).tolist() == [*lengths[:2], rest[0], lengths[2], rest[1]]
    assert batch.max_seqlen == max(*lengths, *rest)
    assert batch.segment_datasets.tolist() == [1, 0, -1, 1, -1]
    assert batch.dataset_names == ("a", "b")
    assert batch.sample_ids == ("picture:1", "essay:2", "film:3")
    assert batch.real_tokens == sum(lengths)
    places = segments(batch)
    for place, sample in zip((places[0], places[1], places[3]), samples, strict=True):
        assert batch.input_ids[place].tolist() == sample.input_ids.tolist()
        assert batch.position_ids[:, place].tolist() == sample.position_ids.tolist()
        assert not batch.padding_mask[place].any()
    for place in (places[2], places[4]):
        assert set(batch.input_ids[place].tolist()) == {tokenizer.pad_id}
        assert not batch.position_ids[:, place].any()
        assert batch.padding_mask[place].all()


@pytest.mark.parametrize(("loss", "alpha"), [("token", 0.0), ("sqrt", 0.5), ("sample", 1.0)])
def test_labels_are_the_next_tokens_of_the_same_sample(
    samples: list[EncodedSample], tokenizer: Tokenizer, loss: str, alpha: float
) -> None:
    weighted = replace(samples[1], target_weights=samples[1].target_weights * np.float32(0.5))
    batch = pack(
        [[samples[0], weighted, samples[2]]],
        PackLayout(3 * LENGTH, loss, ("a", "b"), tokenizer.pad_id),
    )
    labels, weights = batch.labels.tolist(), batch.loss_weights.tolist()
    expected_labels, expected_weights = [IGNORED] * (3 * LENGTH), [0.0] * (3 * LENGTH)
    start = 0
    for sample in (samples[0], weighted, samples[2]):
        supervised = sum(weight > 0 for weight in sample.target_weights)
        for t in range(1, len(sample.input_ids)):
            if sample.target_weights[t] > 0:
                expected_labels[start + t - 1] = int(sample.input_ids[t])
                expected_weights[start + t - 1] = (
                    float(sample.target_weights[t]) * supervised**-alpha
                )
        start += len(sample.input_ids)
    assert labels == expected_labels
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-6)
    assert batch.supervised_tokens == sum(label != IGNORED for label in labels) > 0


def test_patches_and_rows_follow_the_tokens(
    batch: PackedBatch, samples: list[EncodedSample], tokenizer: Tokenizer
) -> None:
    visual = torch.isin(
        batch.input_ids, torch.tensor([tokenizer.special(IMAGE), tokenizer.special(VIDEO)])
    )
    assert batch.visual_rows.tolist() == torch.nonzero(visual).flatten().tolist()
    assert batch.grid_thw.tolist() == [[1, 2, 6], [2, 2, 2]]
    assert len(batch.patches) == 4 * len(batch.visual_rows) == int(batch.grid_thw.prod(1).sum())
    assert samples[0].patches is not None
    image, film_rows = batch.patches[:12].reshape(-1, 3, 2, 256), batch.patches[12:]
    assert torch.equal(image[:, :, 0], image[:, :, 1])
    assert np.array_equal(image[:, :, 0].reshape(12, 768), samples[0].patches)
    assert np.array_equal(film_rows, samples[2].patches)
    alone = pack([[samples[0]]], PackLayout(LENGTH, "sqrt", ("b",), tokenizer.pad_id))
    assert np.array_equal(alone.patches, samples[0].patches)


def test_types(batch: PackedBatch) -> None:
    names = (
        "input_ids",
        "labels",
        "visual_rows",
        "loss_weights",
        "position_ids",
        "cu_seqlens",
        "grid_thw",
        "segment_datasets",
    )
    types = [torch.int64] * 3 + [torch.float32] + [torch.int32] * 4
    assert [getattr(batch, name).dtype for name in names] == types
    assert (batch.patches.dtype, batch.padding_mask.dtype) == (torch.uint8, torch.bool)
    copy = batch.to("meta")
    assert copy.patches.is_meta
    assert copy.cu_seqlens.is_meta
    assert (copy.sample_ids, copy.max_seqlen, copy.real_tokens) == (
        batch.sample_ids,
        batch.max_seqlen,
        batch.real_tokens,
    )


def test_a_pack_may_be_full_or_empty(samples: list[EncodedSample], tokenizer: Tokenizer) -> None:
    length = len(samples[1].input_ids)
    full = pack([[samples[1]], []], PackLayout(length, "token", ("a",), tokenizer.pad_id))
    assert full.cu_seqlens.tolist() == [0, length, 2 * length]
    assert full.segment_datasets.tolist() == [0, -1]
    assert full.patches.shape == (0, 768)
    assert full.grid_thw.shape == (0, 3)


def test_prompts_share_a_pack(samples: list[EncodedSample], tokenizer: Tokenizer) -> None:
    prompts = [extend(prompt_of(samples[0]), [5, 6]), prompt_of(samples[2])]
    batch, starts = pack_prompts(prompts, tokenizer.pad_id, pack_multiple=8)
    assert len(batch.input_ids) % 8 == 0
    last = [
        int(start) + len(prompt.input_ids) - 1
        for start, prompt in zip(starts, prompts, strict=True)
    ]
    assert batch.input_ids[last].tolist() == [6, int(prompts[1].input_ids[-1])]
    assert batch.supervised_tokens == 0
    assert (
        batch.position_ids[:, last[0]].tolist()
        == [int(samples[0].position_ids[0, samples[0].prompt_length - 1]) + 2] * 3
    )


def test_prompts_begin_at_multiples(samples: list[EncodedSample], tokenizer: Tokenizer) -> None:
    prompts = [prompt_of(samples[0]), prompt_of(samples[2])]
    batch, starts = pack_prompts(prompts, tokenizer.pad_id, pack_multiple=8, sample_multiple=4)
    for start, prompt in zip(starts.tolist(), prompts, strict=True):
        assert start % 4 == 0
        assert (
            batch.input_ids[start : start + len(prompt.input_ids)].tolist()
            == prompt.input_ids.tolist()
        )
    assert batch.padding_mask.sum() == len(batch.input_ids) - sum(
        len(prompt.input_ids) for prompt in prompts
    )
