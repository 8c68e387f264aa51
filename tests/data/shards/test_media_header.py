"""Header facts equal what was written. References: Pillow and PyAV, which wrote the members and decode them whole."""

import io
import sys

import numpy as np
import pytest
from PIL import Image as Pillow

from visionloom.data.shards.index import difference
from visionloom.data.shards.media_header import MediaFacts, kind_of, probe
from visionloom.data.shards.open_media import FORMATS
from visionloom.tests.data.samples import png

av = pytest.importorskip("av")


def video(
    frames: int,
    rate: int = 25,
    sides: tuple[int, int] = (48, 64),
    container: str = "mp4",
    codec: str = "mpeg4",
) -> bytes:
    """A film of noise."""
    file, noise = io.BytesIO(), np.random.default_rng(0)
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *sides, "yuv420p"
        for _ in range(frames):
            pixels = noise.integers(0, 256, (*sides, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        out.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("name", FORMATS)
def test_a_picture_of_every_format(name: str) -> None:
    file = io.BytesIO()
    Pillow.fromarray(np.zeros((7, 5, 3), np.uint8)).save(file, name)
    ending = {"JPEG": "jpg", "TIFF": "tif"}.get(name, name.lower())
    assert probe(f"img0.{ending}", file.getvalue()) == MediaFacts("image", 5, 7, 1)
    assert probe(f"img0.{ending.upper()}", file.getvalue()) == MediaFacts("image", 5, 7, 1)


def test_a_picture_is_not_decoded() -> None:
    """Half of the file is enough."""
    data = png(300, 200)
    assert probe("a.png", data[: len(data) // 2]) == MediaFacts("image", 200, 300, 1)


@pytest.mark.parametrize(
    ("container", "codec"),
    [("mp4", "mpeg4"), ("matroska", "mpeg4"), ("mp4", "h264"), ("avi", "mpeg4")],
)
def test_a_video_of_every_container(container: str, codec: str) -> None:
    data = video(30, 10, container=container, codec=codec)
    found = probe(f"vid0.{'mkv' if container == 'matroska' else container}", data)
    with av.open(io.BytesIO(data)) as whole:
        decoded = sum(1 for _ in whole.decode(video=0))
    assert (found.kind, found.width, found.height, found.frames) == ("video", 64, 48, decoded)
    assert found.fps == pytest.approx(10)
    assert found.duration == pytest.approx(3, abs=0.11)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"garbage", "a.png is no picture that can be read"),
        ("a.jpg", b"", "a.jpg is no picture that can be read"),
        ("v.mp4", b"garbage" * 99, "v.mp4 is no video that can be read"),
        ("v.mp4", video(9)[:-300], "v.mp4"),
    ],
)
def test_an_unreadable_header_is_one_sentence(name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        probe(name, data)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_seen_by_its_header() -> None:
    bomb = bytearray(png(4, 4))
    bomb[16:24] = (40_000).to_bytes(4) + (30_000).to_bytes(4)
    with pytest.raises(ValueError, match=r"a\.png"):
        probe("a.png", bytes(bomb))


def test_other_members_have_no_numbers() -> None:
    assert probe("notes.txt", b"x") == MediaFacts("other")
    assert [kind_of(name) for name in ("a.WEBP", "vid0.000.jpg", "v.webm", "a", "json")] == [
        "image",
        "image",
        "video",
        *["other"] * 2,
    ]


def test_without_pyav_a_videos_numbers_are_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert probe("v.mp4", b"anything") == MediaFacts("video")
    assert difference(MediaFacts("video", 4, 4, 9, 25.0, 1.0), MediaFacts("video")) == ""


def test_differences_are_sentences() -> None:
    film = MediaFacts("video", 64, 48, 30, 10.0, 3.0)
    assert difference(film, film) == ""
    assert difference(film, MediaFacts("video", 64, 48, 30, 10.05, 3.01)) == ""
    assert (
        difference(film, MediaFacts("video", 48, 64, 30, 10.0, 3.0))
        == "48x64 pixels, the sample says 64x48"
    )
    assert (
        difference(film, MediaFacts("video", 64, 48, 31, 10.0, 3.0))
        == "31 frames, the sample says 30"
    )
    assert (
        difference(film, MediaFacts("video", 64, 48, 30, 25.0, 3.0)) == "fps 25, the sample says 10"
    )
    assert (
        difference(MediaFacts("image", 3, 4, 1), MediaFacts("image")) == "its header cannot be read"
    )
