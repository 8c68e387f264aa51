"""From bytes to patches, ours beside the peers', on one core: python benchmarks/data/media.py [--repetitions 7]

N2  a JPEG of 0.29 MPix to patches, against Pillow and transformers' default image processor
N3  frames of 640 x 360 to patches, against transformers' video processor
N4  wanted frames out of an H.264 file, against PyAV decoding every frame and converting the wanted ones

Each row is the median CPU time of its repetitions, ours and the peer's taken in turn; the pixels are compared before.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2] / ".link")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from visionloom.benchmarks.data.synthetic import CLIP, CLIP_RATE, clip, photograph
from visionloom.benchmarks.data.table import Row, show
from visionloom.data.config import MediaConfig
from visionloom.data.encode import image
from visionloom.data.encode.geometry import (
    PATCH_SIZE,
    chosen_frames,
    frame_size,
    frame_times,
    image_grid,
)
from visionloom.data.encode.image import decode_image, resize
from visionloom.data.encode.patches import IMAGE_ROW, VIDEO_ROW, put
from visionloom.data.encode.video import decode_frames
from visionloom.data.shards.sample import Image, Video

RULES: Final = MediaConfig()
HALF: Final = [0.5, 0.5, 0.5]
Work = Callable[[], Any]


def compared(
    goal: str,
    what: str,
    unit: str,
    milliseconds: tuple[float, float],
    peer: str,
    most: float | None,
) -> Row:
    """A row of milliseconds for one unit of work, ours and the peer's; `most` is the ratio that is aimed at."""
    ours, theirs = milliseconds
    said, target = f"{ours:.2f} ms/{unit}, {ours / theirs:.2f}x", f"<= {most:g}x" if most else ""
    numbers = {"ours_ms": ours, "peer_ms": theirs, "ratio": ours / theirs}
    return Row(
        goal,
        what,
        said,
        f"{theirs:.2f} ({peer})",
        target,
        ours / theirs <= most if most else None,
        numbers,
    )


def measure(repetitions: int, units: int, *works: Work) -> list[float]:
    """Median CPU milliseconds of a unit of each work, all in turn so that they meet the same noise."""
    seconds: list[list[float]] = [[] for _ in works]
    for repetition in range(repetitions + 1):
        for number, work in enumerate(works):
            start = time.process_time()
            work()
            if repetition:  # the first one warms up
                seconds[number].append(time.process_time() - start)
    return [median(found) * 1000 / units for found in seconds]


def images(repetitions: int) -> Iterator[Row]:
    """N2."""
    files = [(data, Image("", width, height)) for data, width, height in map(photograph, range(48))]
    buffers = [
        np.empty((int(np.prod(image_grid(picture, RULES))), IMAGE_ROW), np.uint8)
        for _, picture in files
    ]
    limits = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
    processor = Qwen2VLImageProcessor(
        size=limits, patch_size=PATCH_SIZE, image_mean=HALF, image_std=HALF
    )

    def ours() -> None:
        for (data, picture), out in zip(files, buffers, strict=True):
            _, rows, columns = image_grid(picture, RULES)
            pixels = decode_image(data, (picture.height, picture.width), "", "")
            put(out, resize(pixels, rows * PATCH_SIZE, columns * PATCH_SIZE))

    def without_simplejpeg() -> None:
        known, image.simplejpeg = image.simplejpeg, None
        try:
            ours()
        finally:
            image.simplejpeg = known

    def peer() -> list[torch.Tensor]:
        opened = (Pillow.open(io.BytesIO(data)).convert("RGB") for data, _ in files)
        return [
            processor(images=[picture], return_tensors="pt")["pixel_values"] for picture in opened
        ]

    ours()
    for rows, expected in zip(buffers, peer(), strict=True):
        same(rows, expected.reshape(-1, 3, 2, PATCH_SIZE**2)[:, :, 0].reshape(-1, IMAGE_ROW))
    quick, plain, slow = measure(repetitions, len(files), ours, without_simplejpeg, peer)
    peer_name = "Pillow, Qwen2VLImageProcessor"
    yield compared("N2", "JPEG to patches, simplejpeg", "image", (quick, slow), peer_name, 0.45)
    yield compared("", "JPEG to patches, Pillow", "image", (plain, slow), peer_name, None)


def frames(repetitions: int) -> Iterator[Row]:
    """N3."""
    data, video = film(20)
    indices = chosen_frames(video, RULES)
    stored = list(decode_frames(data, video, indices, frame_times(video, indices), ""))
    stacked = torch.from_numpy(np.stack(stored)).permute(0, 3, 1, 2)
    size = frame_size(video, len(indices), RULES)
    per_patch = size[0] * size[1] // PATCH_SIZE**2
    out = np.empty((len(stored) // 2 * per_patch, VIDEO_ROW), np.uint8)
    limits = {"shortest_edge": 4_096, "longest_edge": 25_165_824}
    processor = Qwen3VLVideoProcessor(
        size=limits, do_sample_frames=False, cap_pixels_per_frame=False
    )

    def ours() -> None:
        for number, pixels in enumerate(stored):
            place = number // 2 * per_patch
            put(out[place : place + per_patch], resize(pixels, *size), number % 2)

    def peer() -> torch.Tensor:
        return processor(videos=[stacked], return_tensors="pt")["pixel_values_videos"]

    ours()
    same(out, peer())
    quick, slow = measure(repetitions, len(stored), ours, peer)
    yield compared(
        "N3", "frame of 640x360 to patches", "frame", (quick, slow), "Qwen3VLVideoProcessor", 0.25
    )


def film(seconds: float) -> tuple[bytes, Video]:
    """An H.264 file and what a sample says of it."""
    height, width = CLIP
    count = round(seconds * CLIP_RATE)
    return clip(0, seconds), Video(
        (),
        (),
        width,
        height,
        ref="a.mp4",
        file_frames=count,
        fps=float(CLIP_RATE),
        duration=count / CLIP_RATE,
    )


def files(repetitions: int) -> Iterator[Row]:
    """N4."""
    data, video = film(60)
    for goal, rate, target in (("N4", 2.0, 0.8), ("N4", 1.0, 0.6), ("", 0.25, None)):
        indices = chosen_frames(video, MediaConfig(video_fps=rate))
        wanted = set(indices.tolist())

        def ours(indices: NDArray[np.int64] = indices) -> list[NDArray[np.uint8]]:
            return list(decode_frames(data, video, indices, frame_times(video, indices), ""))

        def peer(wanted: set[int] = wanted) -> list[NDArray[np.uint8]]:
            with av.open(io.BytesIO(data)) as container:
                container.streams.video[0].codec_context.thread_count = 1
                shown = enumerate(container.decode(video=0))
                return [
                    frame.to_ndarray(format="rgb24", threads=1)
                    for number, frame in shown
                    if number in wanted
                ]

        assert all(np.array_equal(*pair) for pair in zip(ours(), peer(), strict=True)), (
            "frames differ"
        )
        stamps = stamps_of(data, wanted)

        def leaned_on(stamps: set[int] = stamps) -> int:
            return decode_leaned_on(data, stamps)

        works = (ours, peer, leaned_on)
        quick, slow, least = measure(max(3, repetitions // 2), len(indices), *works)
        what = f"wanted frames of an H.264 file, {rate:g} a second"
        yield compared(goal, what, "frame", (quick, slow), "PyAV, all decoded", target)
        bound = "  decoding alone of them and the reference frames before them"
        yield compared("", bound, "frame", (least, slow), "PyAV, all decoded", None)


def stamps_of(data: bytes, numbers: set[int]) -> set[int]:
    """Stamps of the frames with these numbers, in the order in which they are shown."""
    with av.open(io.BytesIO(data)) as container:
        stamps = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
    return {stamps[number] for number in numbers}


def decode_leaned_on(data: bytes, wanted: set[int]) -> int:
    """Decode what wanted frames may lean on and count what comes out: no decoder with the same pixels does less.

    Those are the reference frames from a keyframe up to the last wanted one before the next keyframe. Nothing is checked
    or converted.
    """
    groups: list[list[Any]] = []
    count = 0
    with av.open(io.BytesIO(data)) as container:
        context = container.streams.video[0].codec_context
        context.thread_count = 1
        for packet in container.demux(video=0):
            if packet.is_keyframe and packet.size:
                groups.append([])
            groups[-1].append(packet)
        for group in groups:
            last = max((n for n, packet in enumerate(group) if packet.pts in wanted), default=-1)
            for packet in group[: last + 1]:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                count += len(context.decode(packet))
            context.flush_buffers()
    return count


def same(rows: NDArray[np.uint8], expected: torch.Tensor) -> None:
    """Check our pixels against the peer's before it has normalised them."""
    found = ((expected + 1) * 127.5).round().to(torch.uint8).numpy()
    assert np.array_equal(rows, found), f"{np.count_nonzero(rows != found)} pixels differ"


def rows(repetitions: int) -> Iterator[Row]:
    """N2, N3, N4."""
    torch.set_num_threads(1)
    for part in (images, frames, files):
        yield from part(repetitions)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description="decoding and cutting of pictures and videos, against the peers"
    )
    parser.add_argument("--repetitions", type=int, default=7)
    show(rows(parser.parse_args().repetitions))


if __name__ == "__main__":
    main()
