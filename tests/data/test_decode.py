"""Pixels. Reference: Qwen2VLImageProcessor and Qwen3VLVideoProcessor of transformers, torchvision backend."""

import io

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from visionloom.data import decode, image
from visionloom.data.config import MediaConfig
from visionloom.data.decode import decode_patches
from visionloom.data.encode import EncodedSample, encode
from visionloom.data.image import decode_image
from visionloom.data.sample import Image, Message, Sample, SampleError, Text, Video
from visionloom.data.tokenizer import Tokenizer

RULES = MediaConfig(image_min_pixels=4096, image_max_pixels=40_000, video_min_pixels=4096, video_max_pixels=120_000)
HALF = [0.5, 0.5, 0.5]


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A picture with edges and gradients, where resizing rules differ most."""
    rng = np.random.default_rng(seed)
    coarse = Pillow.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height), Pillow.Resampling.NEAREST)
    return np.clip(np.asarray(coarse).astype(int) + rng.integers(-20, 20, (height, width, 3)), 0, 255).astype(np.uint8)


def file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Pillow.fromarray(pixels).save(out, kind)
    return out.getvalue()


def encoded(media: Image | Video, tokenizer: Tokenizer) -> EncodedSample:
    return encode(Sample("s", "chat", (Message("user", (media, Text("?"))),)), tokenizer, RULES)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (65, 96), (30, 41), (500, 300), (200, 201), (33, 1000)])
def test_images_are_transformers(height: int, width: int, tokenizer: Tokenizer) -> None:
    pixels = smooth(height, width, height)
    reference = Qwen2VLImageProcessor(
        size={"shortest_edge": 4096, "longest_edge": 40_000}, patch_size=16, image_mean=HALF, image_std=HALF
    )(images=[Pillow.fromarray(pixels)], return_tensors="pt")
    sample = encoded(Image("a.png", width, height), tokenizer)
    rows = decode_patches(sample, lambda ref: file(pixels), RULES)
    assert sample.grids.tolist() == reference["image_grid_thw"].tolist()
    expected = reference["pixel_values"].reshape(-1, 3, 2, 256)
    torch.testing.assert_close(torch.from_numpy(rows).reshape(-1, 3, 256) / 127.5 - 1, expected[:, :, 0], atol=1e-6, rtol=0)
    wide = torch.from_numpy(decode.widen(rows, 1536)) / 127.5 - 1
    torch.testing.assert_close(wide, reference["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("frames", "height", "width"), [(2, 64, 64), (5, 100, 75), (4, 400, 300), (3, 20, 64)])
def test_videos_are_transformers(frames: int, height: int, width: int, tokenizer: Tokenizer) -> None:
    pictures = {f"{index}.png": smooth(height, width, index) for index in range(frames)}
    reference = Qwen3VLVideoProcessor(
        size={"shortest_edge": 4096, "longest_edge": 120_000}, do_sample_frames=False, cap_pixels_per_frame=False
    )(videos=[torch.from_numpy(np.stack(list(pictures.values()))).permute(0, 3, 1, 2)], return_tensors="pt")
    video = Video(tuple(pictures), tuple(index / 2 for index in range(frames)), width, height)
    sample = encoded(video, tokenizer)
    rows = decode_patches(sample, lambda ref: file(pictures[ref]), RULES)
    assert sample.grids.tolist() == reference["video_grid_thw"].tolist()
    torch.testing.assert_close(torch.from_numpy(rows) / 127.5 - 1, reference["pixel_values_videos"], atol=1e-6, rtol=0)


def test_what_is_transparent_becomes_white() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, 16:] = (10, 20, 30, 255)
    found = decode_image(file(pixels), (32, 32), "s", "a.png")
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 31].tolist() == [10, 20, 30]
    grey = Pillow.fromarray(np.full((32, 32), 7, np.uint8))
    out = io.BytesIO()
    grey.save(out, "JPEG")
    assert decode_image(out.getvalue(), (32, 32), "s", "a.jpg")[5, 5].tolist() == [7, 7, 7]


def test_damaged_pictures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    good = file(smooth(64, 64, 0))
    for data, problem in (
        (b"no picture", "cannot be decoded"),
        (good[: len(good) // 2], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "cannot be decoded"),
        (file(smooth(32, 64, 0)), "64x32 pixels, the sample says 64x64"),
    ):
        with pytest.raises(SampleError, match=f"sample s: a.png: {problem}"):
            decode_image(data, (64, 64), "s", "a.png")
    monkeypatch.setattr(image, "MAX_PIXELS", 4095)
    with pytest.raises(SampleError, match="too many"):
        decode_image(good, (64, 64), "s", "a.png")
