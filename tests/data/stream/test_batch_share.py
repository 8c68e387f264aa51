"""Pictures of a pack dealt to encoder ranks. Reference: the batch of a single rank."""

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from visionloom.data.encode.encode import EncodedSample, encode
from visionloom.data.encode.patches import Unit, decode_into, widen
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.shards.sample import Image, Message, Sample, SampleError, Text, Video
from visionloom.data.stream.batch import IGNORED, Decode, PackedBatch, PackLayout, pack
from visionloom.parallel.share import Share
from visionloom.tests.data.encode.test_video import described
from visionloom.tests.data.encode.test_video import film as video_file
from visionloom.tests.data.samples import RULES, essay, film, picture_question, png

LENGTH = 4096
Read = Callable[[str], bytes]


@pytest.fixture(scope="module")
def members() -> dict[str, bytes]:
    frames = {f"{index:03d}.png": png(70, 90, index) for index in range(9)}
    return {
        "a.png": png(40, 70, 1),
        "b.png": png(96, 64, 2),
        "c.png": png(33, 40, 3),
        "v.mp4": video_file(list(range(100))),
        **frames,
    }


@pytest.fixture(scope="module")
def samples(tokenizer: Tokenizer) -> list[EncodedSample]:
    frames = Video(
        tuple(f"{index:03d}.png" for index in range(9)),
        tuple(index / 2 for index in range(9)),
        90,
        70,
    )
    clip = replace(described(100), ref="v.mp4", total_pixels=200_000)
    contents = [
        (Image("a.png", 70, 40), Text("and"), frames, Image("c.png", 40, 33)),
        (Text("nothing"),),
        (clip, Image("b.png", 64, 96)),
        (Image("b.png", 64, 96),),
    ]
    chats = [
        (Message("user", (*content, Text("?"))), Message("assistant", (Text("Yes."),)))
        for content in contents
    ]
    return [
        encode(Sample(f"s{n}", "chat", chat), tokenizer, RULES, "a") for n, chat in enumerate(chats)
    ]


def reading(
    samples: Sequence[EncodedSample], members: dict[str, bytes], broken: Sequence[str] = ()
) -> Decode:
    """As the stream's reader does it."""

    def decode(number: int, units: Sequence[Unit], out: NDArray[np.uint8]) -> bool:
        try:
            damaged = {name: b"" if name in broken else data for name, data in members.items()}
            decode_into(out, samples[number], units, damaged.__getitem__, RULES)
        except SampleError:
            return False
        return True

    return decode


def rows_of_units(batch: PackedBatch, rank: int) -> dict[int, NDArray[np.uint8]]:
    """Rows of this rank's units, in the wide form, by the unit's number."""
    sizes, found, start = batch.grid_thw.prod(1).tolist(), {}, 0
    for unit, owner in enumerate(batch.encoder_ranks.tolist()):
        if owner == rank:
            found[unit] = widen(batch.patches.numpy()[start : start + sizes[unit]], 1536)
            start += sizes[unit]
    assert start == len(batch.patches)
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [2], [3], [1], [], [1, 0]], ids=str)
def test_the_ranks_together_have_the_batch_of_one(
    ranks: int,
    numbers: list[int],
    samples: list[EncodedSample],
    members: dict[str, bytes],
    tokenizer: Tokenizer,
) -> None:
    here = [samples[number] for number in numbers]
    layout = (
        [here[:2], here[2:]],
        PackLayout(LENGTH, "sqrt", ("a",), tokenizer.pad_id),
        reading(here, members),
    )
    whole = pack(*layout)
    shares = [
        pack(*layout, share=Share(encoder_rank=rank, encoder_ranks=ranks)) for rank in range(ranks)
    ]
    units = [
        unit for rank, share in enumerate(shares) for unit in rows_of_units(share, rank).items()
    ]
    assert sorted(number for number, _ in units) == list(range(len(shares[0].grid_thw)))
    together = [rows for _, rows in sorted(units, key=lambda unit: unit[0])]
    assert np.array_equal(
        np.concatenate([np.empty((0, 1536), np.uint8), *together]),
        widen(whole.patches.numpy(), 1536),
    )
    for share in shares:
        assert (
            share.patch_count
            == whole.patch_count
            == len(whole.patches)
            == sum(len(other.patches) for other in shares)
        )
        for name in (
            "input_ids",
            "labels",
            "loss_weights",
            "position_ids",
            "cu_seqlens",
            "visual_rows",
            "unreadable",
        ):
            assert torch.equal(getattr(share, name), getattr(whole, name))
        assert torch.equal(share.grid_thw, shares[0].grid_thw)
        assert torch.equal(share.encoder_ranks, shares[0].encoder_ranks)
    assert not whole.encoder_ranks.any()
    grids = [sample.grids for sample in here]
    assert torch.equal(
        whole.grid_thw, torch.from_numpy(np.concatenate([np.empty((0, 3), np.int32), *grids]))
    )


def test_a_rank_without_pictures_has_no_rows(tokenizer: Tokenizer) -> None:
    sample, media = picture_question(1)
    here = [encode(sample, tokenizer, RULES, "a")]
    share = pack(
        [here],
        PackLayout(LENGTH, "sqrt", ("a",), tokenizer.pad_id),
        reading(here, media),
        share=Share(encoder_rank=3, encoder_ranks=4),
    )
    assert share.patches.shape == (0, 768)
    assert len(share.grid_thw) == 1
    assert share.encoder_ranks.tolist() == [0]


def test_what_one_rank_cannot_read_all_leave_out(
    samples: list[EncodedSample], members: dict[str, bytes], tokenizer: Tokenizer
) -> None:
    good = pack(
        [samples], PackLayout(LENGTH, "sqrt", ("a",), tokenizer.pad_id), reading(samples, members)
    )
    decode = reading(samples, members, broken=["c.png"])
    shares = [
        pack(
            [samples],
            PackLayout(LENGTH, "sqrt", ("a",), tokenizer.pad_id),
            decode,
            Share(0, 1, rank, 3),
        )
        for rank in range(3)
    ]
    alone = pack([samples], PackLayout(LENGTH, "sqrt", ("a",), tokenizer.pad_id), decode)
    assert alone.unreadable.tolist() == [True, False, False, False, False]
    found = torch.stack([share.unreadable for share in shares])
    assert found.sum() == 1  # one rank alone had that picture
    agreed = [share.without(found.any(0)) for share in shares]
    for share in [*agreed, alone]:
        assert torch.equal(share.labels, alone.labels)
        assert torch.equal(share.loss_weights, alone.loss_weights)
        assert torch.equal(share.input_ids, good.input_ids)
        assert (
            share.supervised_tokens
            == alone.supervised_tokens
            == int((alone.labels != IGNORED).sum())
        )
    border = int(good.cu_seqlens[1])
    assert (alone.labels[:border] == IGNORED).all()
    assert not alone.loss_weights[:border].any()
    assert torch.equal(alone.labels[border:], good.labels[border:])
    assert 0 < alone.supervised_tokens < good.supervised_tokens
    rows = samples[0].patch_count
    assert not alone.patches[:rows].any()
    assert torch.equal(alone.patches[rows:], good.patches[rows:])


def test_patches_exist_once(tokenizer: Tokenizer) -> None:
    sample, media = picture_question(1, (512, 512))
    wide = replace(RULES, image_max_pixels=1 << 20)
    here = [encode(sample, tokenizer, wide, "a")] * 24
    picture = np.frombuffer(media["a.png"], np.uint8)

    def decode(number: int, units: Sequence[Unit], out: NDArray[np.uint8]) -> bool:
        decode_into(out, here[number], units, lambda ref: picture.tobytes(), wide)
        return True

    tracemalloc.start()
    batch = pack([here], PackLayout(24 * 512, "sqrt", ("a",), tokenizer.pad_id), decode)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    text = 24 * 512 * 40
    assert batch.patches.numel() == 24 * 512 * 512 * 3
    assert peak < batch.patches.numel() + 6 * 512 * 512 * 3 + text


def test_samples_with_patches_need_no_decoding(tokenizer: Tokenizer) -> None:
    (picture, media), (clip, frames), (text, _) = picture_question(1), film(2, frames=5), essay(3)
    here = [encode(sample, tokenizer, RULES, "a") for sample in (picture, clip, text)]
    decode = reading(here, media | frames)
    ready = []
    for number, sample in enumerate(here):
        rows = np.empty((sample.patch_count, 1536 if number == 1 else 768), np.uint8)
        decode(number, [(n, 0, int(grid[0])) for n, grid in enumerate(sample.grids)], rows)
        ready.append(replace(sample, patches=rows))
    for ranks in (1, 3):
        for rank in range(ranks):
            layout = PackLayout(LENGTH, "sqrt", ("a",), tokenizer.pad_id)
            copied = pack([ready], layout, share=Share(encoder_rank=rank, encoder_ranks=ranks))
            assert torch.equal(
                copied.patches, pack([here], layout, decode, Share(0, 1, rank, ranks)).patches
            )
