"""Video files. Reference: PyAV decoding every frame, on files that the test encodes (H.264 with B-frames, open groups, VP9)."""

import io
import tracemalloc
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from visionloom.data.config import MediaConfig
from visionloom.data.encode.geometry import chosen_frames, frame_times
from visionloom.data.encode.video import decode_frames
from visionloom.data.shards.sample import SampleError, Video

HEIGHT, WIDTH = 96, 128
CODERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "b_frames": ("mp4", "libx264", {"bf": "3", "b-pyramid": "normal", "preset": "fast", "g": "25"}),
    "open_groups": (
        "mp4",
        "libx264",
        {"bf": "3", "x264-params": "open-gop=1:keyint=20:min-keyint=20:scenecut=0"},
    ),
    "hevc": ("mp4", "libx265", {"x265-params": "keyint=24:log-level=error"}),
    "one_group": ("matroska", "libx264", {"bf": "2", "g": "1000"}),
    "vp9": ("webm", "libvpx-vp9", {"g": "30", "deadline": "realtime", "cpu-used": "8"}),
    "mpeg4": ("mp4", "mpeg4", {"bf": "2", "g": "12"}),
}


def moving(number: int) -> np.ndarray:
    """A picture with a moving square on a slowly changing ground of noise."""
    rng = np.random.default_rng(number // 9)
    pixels = rng.integers(60, 120, (HEIGHT // 8, WIDTH // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    left, top = 3 * number % (WIDTH - 24), 2 * number % (HEIGHT - 24)
    pixels[top : top + 24, left : left + 24] = (250, number % 256, 20)
    return pixels


def film(stamps: list[int], coder: str = "b_frames", base: Fraction = Fraction(1, 25)) -> bytes:
    """A file whose frames are shown at these stamps, in units of `base` seconds."""
    container_format, codec, options = CODERS[coder]
    file = io.BytesIO()
    with av.open(file, "w", format=container_format) as container:
        stream: Any = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.time_base = (
            WIDTH,
            HEIGHT,
            "yuv420p",
            base,
        )
        stream.codec_context.time_base = base
        for number, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(moving(number), format="rgb24")
            frame.pts, frame.time_base = stamp, base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def every_frame(data: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def described(count: int, fps: float = 25.0, times: tuple[float, ...] = (), **values: Any) -> Video:
    return Video(
        (),
        times,
        WIDTH,
        HEIGHT,
        ref="a.mp4",
        file_frames=count,
        fps=fps,
        duration=count / fps,
        **values,
    )


def chosen(data: bytes, video: Video, indices: list[int]) -> list[np.ndarray]:
    frames = np.array(indices, np.int64)
    return list(decode_frames(data, video, frames, frame_times(video, frames), "s"))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return {
        coder: film(list(range(100)), coder)
        for coder in CODERS
        if CODERS[coder][1] in av.codecs_available
    }


@pytest.mark.parametrize("coder", list(CODERS))
@pytest.mark.parametrize(
    "indices",
    [
        list(range(0, 100, 12)),
        [0],
        [99],
        [37, 38, 39],
        [21, 60],
        list(range(100)),
        [1, 19, 20, 22, 41, 77, 98],
    ],
    ids=lambda indices: f"{indices[0]}..{indices[-1]}x{len(indices)}",
)
def test_chosen_frames_are_those_of_full_decoding(
    coder: str, indices: list[int], files: dict[str, bytes]
) -> None:
    expected = every_frame(files[coder])
    assert len(expected) == 100
    found = chosen(files[coder], described(100), indices)
    assert len(found) == len(indices)
    for index, pixels in zip(indices, found, strict=True):
        np.testing.assert_array_equal(pixels, expected[index])


@pytest.mark.parametrize("seed", range(6))
def test_random_frames_of_random_groups(seed: int, files: dict[str, bytes]) -> None:
    rng = np.random.default_rng(seed)
    coder = ("b_frames", "open_groups", "hevc")[seed % 3]
    expected = every_frame(files[coder])
    indices = np.sort(rng.choice(100, rng.integers(2, 30), replace=False)).tolist()
    for index, pixels in zip(indices, chosen(files[coder], described(100), indices), strict=True):
        np.testing.assert_array_equal(pixels, expected[index])


def test_frames_of_a_variable_rate_are_found_by_their_times() -> None:
    base = Fraction(1, 1000)
    stamps = [20 * i for i in range(50)] + [1000 + 500 * i for i in range(19)]
    data = film(stamps, base=base)
    expected = every_frame(data)
    times = tuple(stamp / 1000 for stamp in stamps)
    video = described(len(stamps), fps=len(stamps) / 10.5, times=times)
    indices = chosen_frames(video, MediaConfig())
    assert len(indices) >= 18
    for index, pixels in zip(indices, chosen(data, video, indices.tolist()), strict=True):
        np.testing.assert_array_equal(pixels, expected[index])
    late = film([stamp + 5000 for stamp in stamps], base=base)  # a file need not begin at zero
    for shift in (0.0, 5.0):  # nor need the times
        shifted = replace(video, times=tuple(time + shift for time in times))
        np.testing.assert_array_equal(chosen(late, shifted, [0, 60])[1], every_frame(late)[60])
    with pytest.raises(
        SampleError,
        match=r"sample s: a\.mp4: shows no frame 30 at 4\.34783 s: its times are others",
    ):
        chosen(data, described(len(stamps), fps=6.9), [30])  # the sample claims a constant rate


def test_work_is_saved(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    from visionloom.data.encode import video as module

    counts = list[int]()
    only = module._only
    monkeypatch.setattr(
        module, "_only", lambda frames, wanted: counts.append(len(frames)) or only(frames, wanted)
    )
    chosen(files["b_frames"], described(100), [3, 80])
    assert sum(counts) < 25  # of 100; groups begin at 0, 25, 50 and 75


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"width": 64}, "128x96 pixels, the sample says 64x96"),
        ({"file_frames": 90}, "100 frames, the sample says 90"),
        ({"fps": 12.5}, "3.96 s from first to last frame, the sample says 7.92"),
    ],
)
def test_wrong_facts_are_named(
    change: dict[str, Any], problem: str, files: dict[str, bytes]
) -> None:
    with pytest.raises(SampleError, match=rf"sample s: a\.mp4: {problem}"):
        chosen(files["b_frames"], replace(described(100), **change), [50])


def test_broken_files_are_named(files: dict[str, bytes]) -> None:
    whole = files["b_frames"]
    inside = whole.index(b"mdat") + len(whole) // 3
    for data, problem in (
        (b"", "cannot be decoded"),
        (b"no video" * 100, "cannot be decoded"),
        (whole[: len(whole) // 2], "cannot be decoded|frames, the sample says"),
        (whole[:inside] + bytes(4000) + whole[inside + 4000 :], "cannot be decoded|is damaged"),
    ):
        with pytest.raises(SampleError, match=rf"sample s: a\.mp4: .*({problem})"):
            chosen(data, described(100), list(range(100)))
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(SampleError, match="holds no video stream"):
        chosen(sound.getvalue(), described(100), [0])


def test_frames_that_grow_are_refused_before_they_are_decoded() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mpegts") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        large: Any = av.CodecContext.create("libx264", "w")
        large.width, large.height, large.pix_fmt = 2048, 2048, "yuv420p"
        large.time_base, large.options = Fraction(1, 25), {"bf": "0", "preset": "ultrafast"}
        for number in range(20):
            side = (HEIGHT, WIDTH) if number < 10 else (2048, 2048)
            frame = av.VideoFrame.from_ndarray(np.full((*side, 3), 99, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            if number == 10:
                container.mux(stream.encode(None))
            for packet in (stream if number < 10 else large).encode(frame):
                packet.stream = stream
                container.mux(packet)
        for packet in large.encode(None):
            packet.stream = stream
            container.mux(packet)
    with av.open(io.BytesIO(file.getvalue())) as container:
        assert {(frame.height, frame.width) for frame in container.decode(video=0)} == {
            (HEIGHT, WIDTH),
            (2048, 2048),
        }
    assert len(chosen(file.getvalue(), described(20), [0, 9])) == 2
    with pytest.raises(SampleError, match="cannot be decoded"):
        chosen(file.getvalue(), described(20), [0, 15])


def test_full_size_frames_are_not_kept(files: dict[str, bytes]) -> None:
    frames = np.arange(100)
    video = described(100)
    times = frame_times(video, frames)
    tracemalloc.start()
    for pixels in decode_frames(files["b_frames"], video, frames, times, "s"):
        assert pixels.shape == (HEIGHT, WIDTH, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 * HEIGHT * WIDTH * 3  # the frames together are 100 of these
