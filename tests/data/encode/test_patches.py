"""Rows of patches. References: transformers' Qwen2VLImageProcessor and Qwen3VLVideoProcessor, and qwen_vl_utils before them."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from qwen_vl_utils import fetch_image, fetch_video, vision_process
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from visionloom.data.config import MediaConfig
from visionloom.data.encode import patches as decode
from visionloom.data.encode.encode import EncodedSample, encode
from visionloom.data.encode.patches import all_units, decode_into, decode_patches, row_width, widen
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.shards.sample import Image, Message, Sample, Text, Video
from visionloom.tests.data.encode.test_image import file, smooth
from visionloom.tests.data.encode.test_video import described, every_frame, film

RULES = MediaConfig(
    image_min_pixels=4096, image_max_pixels=40_000, video_min_pixels=4096, video_max_pixels=120_000
)
UTILS = MediaConfig(rule="qwen_utils")
HALF = [0.5, 0.5, 0.5]
ONCE_PER_MODULE = [HealthCheck.function_scoped_fixture]


def encoded(
    tokenizer: Tokenizer, *media: Image | Video, rules: MediaConfig = RULES
) -> EncodedSample:
    return encode(Sample("s", "chat", (Message("user", (*media, Text("?"))),)), tokenizer, rules)


def image_processor(**options: Any) -> Qwen2VLImageProcessor:
    size = {"shortest_edge": 4096, "longest_edge": 40_000}
    return Qwen2VLImageProcessor(
        size=size, patch_size=16, image_mean=HALF, image_std=HALF, **options
    )


def video_processor(capped: bool = False, **options: Any) -> Qwen3VLVideoProcessor:
    size = {"shortest_edge": 4096, "longest_edge": 120_000}
    return Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=capped, **options)


def assert_rows(rows: np.ndarray, expected: torch.Tensor) -> None:
    """Equal before normalisation, to the last bit."""
    np.testing.assert_array_equal(rows, ((expected + 1) * 127.5).round().numpy().astype(np.uint8))
    torch.testing.assert_close(torch.from_numpy(rows) / 127.5 - 1, expected, atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None, suppress_health_check=ONCE_PER_MODULE)
@given(height=st.integers(10, 600), width=st.integers(10, 600))
def test_images_are_transformers(height: int, width: int, tokenizer: Tokenizer) -> None:
    pixels = smooth(height, width, height)
    reference = image_processor()(images=[Pillow.fromarray(pixels)], return_tensors="pt")
    sample = encoded(tokenizer, Image("a.png", width, height))
    rows = decode_patches(sample, lambda ref: file(pixels), RULES)
    assert sample.grids.tolist() == reference["image_grid_thw"].tolist()
    assert rows.shape[1] == 768
    assert_rows(widen(rows, 1536), reference["pixel_values"])
    np.testing.assert_array_equal(widen(widen(rows, 1536), 768), rows)


@pytest.mark.parametrize("capped", [False, True], ids=["hf", "hf_capped"])
@settings(max_examples=15, deadline=None, suppress_health_check=ONCE_PER_MODULE)
@given(frames=st.integers(2, 7), height=st.integers(10, 400), width=st.integers(10, 400))
def test_videos_are_transformers(
    frames: int, height: int, width: int, capped: bool, tokenizer: Tokenizer
) -> None:
    pictures = {f"{index}.png": smooth(height, width, index) for index in range(frames)}
    tensor = torch.from_numpy(np.stack(list(pictures.values()))).permute(0, 3, 1, 2)
    reference = video_processor(capped, do_sample_frames=False, max_video_tokens=20)(
        videos=[tensor], return_tensors="pt"
    )
    rules = MediaConfig(
        "hf_capped" if capped else "hf", video_max_pixels=120_000, frame_max_pixels=20 * 1024
    )
    sample = encoded(
        tokenizer,
        Video(tuple(pictures), tuple(i / 2 for i in range(frames)), width, height),
        rules=rules,
    )
    rows = decode_patches(sample, lambda ref: file(pictures[ref]), rules)
    assert sample.grids.tolist() == reference["video_grid_thw"].tolist()
    assert_rows(rows, reference["pixel_values_videos"])


@settings(max_examples=15, deadline=None, suppress_health_check=ONCE_PER_MODULE)
@given(height=st.integers(10, 300), width=st.integers(10, 300))
def test_images_are_qwen_utils(height: int, width: int, tokenizer: Tokenizer) -> None:
    pixels = smooth(height, width, height)
    picture = fetch_image({"image": Pillow.fromarray(pixels)}, image_patch_size=16)
    reference = image_processor(do_resize=False)(images=[picture], return_tensors="pt")
    sample = encoded(tokenizer, Image("a.png", width, height), rules=UTILS)
    rows = decode_patches(sample, lambda ref: file(pixels), UTILS)
    assert sample.grids.tolist() == reference["image_grid_thw"].tolist()
    assert_rows(widen(rows, 1536), reference["pixel_values"])


@settings(
    max_examples=8, deadline=None, suppress_health_check=ONCE_PER_MODULE, phases=[Phase.generate]
)
@given(frames=st.integers(2, 5), height=st.integers(20, 300), width=st.integers(20, 300))
def test_extracted_frames_are_qwen_utils(
    frames: int, height: int, width: int, tokenizer: Tokenizer
) -> None:
    pictures = {f"{index}.png": smooth(height, width, index) for index in range(frames)}
    tensor = fetch_video(
        {"video": [Pillow.fromarray(pixels) for pixels in pictures.values()]}, image_patch_size=16
    )
    processor = video_processor(do_sample_frames=False, do_resize=False)
    reference = processor(videos=[tensor.to(torch.uint8)], return_tensors="pt")
    sample = encoded(
        tokenizer,
        Video(tuple(pictures), tuple(i / 2 for i in range(frames)), width, height),
        rules=UTILS,
    )
    rows = decode_patches(sample, lambda ref: file(pictures[ref]), UTILS)
    assert sample.grids.tolist() == reference["video_grid_thw"].tolist()
    assert_rows(rows, reference["pixel_values_videos"])


@pytest.fixture(scope="module")
def clip() -> bytes:
    return film(list(range(100)))


def test_a_file_is_transformers_from_frames_to_rows(clip: bytes, tokenizer: Tokenizer) -> None:
    tensor = torch.from_numpy(np.stack(every_frame(clip))).permute(0, 3, 1, 2)
    metadata = VideoMetadata(total_num_frames=100, fps=25.0)
    reference = video_processor(fps=2)(
        videos=[tensor], video_metadata=[metadata], do_sample_frames=True, return_tensors="pt"
    )
    sample = encoded(tokenizer, described(100))
    assert sample.grids.tolist() == reference["video_grid_thw"].tolist()
    assert_rows(decode_patches(sample, lambda ref: clip, RULES), reference["pixel_values_videos"])


def test_a_file_is_qwen_utils_from_frames_to_rows(
    clip: bytes, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(
        ele: dict[str, Any],
    ) -> tuple[torch.Tensor, dict[str, Any], float]:  # its readers, on PyAV's frames
        first, last, count = vision_process.calculate_video_frame_range(ele, 100, 25.0)
        indices = (
            torch.linspace(first, last, vision_process.smart_nframes(ele, count, 25.0))
            .round()
            .long()
        )
        return torch.from_numpy(np.stack(every_frame(clip))).permute(0, 3, 1, 2)[indices], {}, 2.0

    monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "torchvision", read)
    monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "torchvision")
    tensor = fetch_video(
        {"video": "a.mp4", "video_start": 0.5, "video_end": 3.7}, image_patch_size=16
    )
    processor = video_processor(do_sample_frames=False, do_resize=False)
    reference = processor(videos=[tensor.to(torch.uint8)], return_tensors="pt")
    sample = encoded(tokenizer, described(100, start=0.5, end=3.7), rules=UTILS)
    assert sample.grids.tolist() == reference["video_grid_thw"].tolist()
    assert_rows(decode_patches(sample, lambda ref: clip, UTILS), reference["pixel_values_videos"])


def members(clip: bytes) -> dict[str, bytes]:
    names = {f"{index}.png": file(smooth(90, 60, index)) for index in range(5)}
    return {
        "a.png": file(smooth(70, 100, 9)),
        "b.jpg": file(smooth(64, 64, 8), "JPEG"),
        "a.mp4": clip,
        **names,
    }


MIXED = (
    Image("a.png", 100, 70),
    described(100),
    Image("b.jpg", 64, 64),
    Video(
        tuple(f"{index}.png" for index in range(5)), tuple(index / 2 for index in range(5)), 60, 90
    ),
)


@pytest.mark.parametrize("seed", range(8))
def test_units_are_slices_of_the_whole(seed: int, clip: bytes, tokenizer: Tokenizer) -> None:
    sample = encoded(tokenizer, *MIXED)
    read = members(clip).__getitem__
    whole = decode_patches(sample, read, RULES)
    assert (
        whole.shape == (sample.patch_count, row_width(sample.media)) == (sample.patch_count, 1536)
    )
    sizes = sample.grids[:, 1] * sample.grids[:, 2]
    starts = np.cumsum(sample.grids[:, 0] * sizes) - sample.grids[:, 0] * sizes
    rng = np.random.default_rng(seed)
    units, expected = [], [np.empty((0, 1536), np.uint8)]
    for number, _, time in all_units(sample):
        for first in range(time):
            if rng.random() < 0.4:
                units.append((number, first, 1))
                expected.append(whole[starts[number] + first * sizes[number] :][: sizes[number]])
    np.testing.assert_array_equal(
        decode_patches(sample, read, RULES, units), np.concatenate(expected)
    )


def test_only_what_is_wanted_is_read(clip: bytes, tokenizer: Tokenizer) -> None:
    sample, asked = encoded(tokenizer, *MIXED), list[str]()

    def read(ref: str) -> bytes:
        asked.append(ref)
        return members(clip)[ref]

    decode_patches(sample, read, RULES, [(2, 0, 1), (3, 2, 1)])
    assert asked == ["b.jpg", "4.png"]


def test_frames_are_resized_as_they_come(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = np.zeros((1200, 1600, 3), np.uint8)
    alive = 0

    def track(function: Callable[..., Any], step: int) -> Callable[..., Any]:
        def tracked(*arguments: Any) -> Any:
            nonlocal alive
            alive += step
            assert 0 <= alive <= 1
            return function(*arguments)

        return tracked

    monkeypatch.setattr(decode, "decode_image", track(lambda *_: large, 1))
    monkeypatch.setattr(decode, "resize", track(decode.resize, -1))
    names = tuple(f"{index}.png" for index in range(20))
    sample = encoded(tokenizer, Video(names, tuple(index / 2 for index in range(20)), 1600, 1200))
    out = np.empty((sample.patch_count, 1536), np.uint8)
    tracemalloc.start()
    decode_into(out, sample, all_units(sample), lambda ref: b"", RULES)
    assert tracemalloc.get_traced_memory()[1] < 2 * large.nbytes
    tracemalloc.stop()


def test_rows_of_a_rank_without_pictures(tokenizer: Tokenizer) -> None:
    assert decode_patches(encoded(tokenizer), lambda ref: b"", RULES).shape == (0, 768)
    assert decode_patches(encoded(tokenizer, *MIXED), lambda ref: b"", RULES, []).shape == (0, 1536)
