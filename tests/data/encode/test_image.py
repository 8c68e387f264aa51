"""Pictures to pixels. References: Pillow for decoding, torchvision and Pillow for resizing."""

import io
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize as reference

from visionloom.data.encode import image
from visionloom.data.encode.image import decode_image, resize, resize_by_pillow
from visionloom.data.shards import open_media
from visionloom.data.shards.sample import SampleError


def smooth(height: int, width: int, seed: int) -> np.ndarray:
    """A picture with edges and gradients, where resizing rules differ most."""
    rng = np.random.default_rng(seed)
    coarse = Pillow.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(
        (width, height), Pillow.Resampling.NEAREST
    )
    return np.clip(
        np.asarray(coarse).astype(int) + rng.integers(-20, 20, (height, width, 3)), 0, 255
    ).astype(np.uint8)


def file(pixels: np.ndarray, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Pillow.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{"subsampling": s} for s in range(3)] + [{"progressive": True}, {"quality": 20}],
    ids=str,
)
@settings(max_examples=8, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90))
def test_jpeg_pixels_are_pillows(
    mode: str, options: dict[str, Any], height: int, width: int
) -> None:
    data = file(smooth(height, width, height), "JPEG", mode, **options)
    np.testing.assert_array_equal(
        decode_image(data, (height, width), "s", "a.jpg"), by_pillow(data)
    )
    quick = image._decode_jpeg(data, (height, width))
    assert (quick is None) == (mode == "CMYK")  # only Pillow reads it


def test_jpeg_without_a_colour_transform_is_pillows() -> None:
    data = file(smooth(50, 70, 0), "JPEG", keep_rgb=True)
    np.testing.assert_array_equal(decode_image(data, (50, 70), "s", "a.jpg"), by_pillow(data))


@pytest.mark.parametrize("start", range(20, 2220, 200))
def test_damaged_jpegs_fare_alike_with_and_without_simplejpeg(
    start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = file(smooth(90, 80, 1), "JPEG", quality=60)
    assert len(good) > 2220
    for data in (
        good[:start],
        good[:start] + bytes(40) + good[start + 40 :],
        good[:start] + good[start + 7 :],
        good + b"more",
    ):
        outcomes = list[Any]()
        for decoder in (image.simplejpeg, None):
            with monkeypatch.context() as patch:
                patch.setattr(image, "simplejpeg", decoder)
                try:
                    outcomes.append(decode_image(data, (90, 80), "s", "a.jpg"))
                except SampleError as error:
                    outcomes.append(str(error))
        assert type(outcomes[0]) is type(outcomes[1])
        np.testing.assert_array_equal(*outcomes)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_resizing_is_torchvisions_and_pillows(
    height: int, width: int, rows: int, columns: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    size = [rows * 32, columns * 32]
    planes = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    expected = reference(planes, size, InterpolationMode.BICUBIC, antialias=True)
    found = resize(pixels, *size)
    np.testing.assert_array_equal(found, expected.numpy())
    assert found.flags.c_contiguous
    pillow = Pillow.fromarray(pixels).resize((size[1], size[0]))
    np.testing.assert_array_equal(resize_by_pillow(pixels, *size), np.asarray(pillow))


def test_what_is_transparent_becomes_white() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, 16:] = (10, 20, 30, 255)
    found = decode_image(file(pixels, mode="RGBA"), (32, 32), "s", "a.png")
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 31].tolist() == [10, 20, 30]


def test_damaged_pictures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    good = file(smooth(64, 64, 0))
    for data, problem in (
        (b"no picture", "cannot be decoded"),
        (good[: len(good) // 2], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "cannot be decoded"),
        (file(smooth(32, 64, 0)), "64x32 pixels, the sample says 64x64"),
        (file(smooth(32, 64, 0), "JPEG"), "64x32 pixels, the sample says 64x64"),
    ):
        with pytest.raises(SampleError, match=f"sample s: a.png: {problem}"):
            decode_image(data, (64, 64), "s", "a.png")
    monkeypatch.setattr(open_media, "MAX_PIXELS", 4095)
    for kind in ("PNG", "JPEG"):
        with pytest.raises(SampleError, match="too many"):
            decode_image(file(smooth(64, 64, 0), kind), (64, 64), "s", "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bombs_are_refused_before_they_unfold(kind: str) -> None:
    small = file(smooth(8, 8, 0), kind)
    if kind == "PNG":  # 60,000 x 60,000 pixels in the header: 10.8 GB
        bomb = small[:16] + (60_000).to_bytes(4) * 2 + small[24:]
        bomb = bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4) + bomb[33:]
    else:
        place = small.index(b"\xff\xc0")
        bomb = small[: place + 5] + (60_000).to_bytes(2) * 2 + small[place + 9 :]
    tracemalloc.start()
    for said in ((60_000, 60_000), (8, 8)):
        with pytest.raises(SampleError, match=r"too many|decompression bomb"):
            decode_image(bomb, said, "s", "a.png")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
