"""From encoded pictures and videos to rows of patches, as uint8. Normalisation to -1..1 is left to the device."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visionloom.data.config import MediaConfig
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.geometry import (
    MERGE_SIZE,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    chosen_frames,
    frame_times,
    stored_size,
)
from visionloom.data.encode.image import (
    Pixels,
    decode_image,
    resize,
    resize_by_pillow,
    resize_in_float,
)
from visionloom.data.encode.video import decode_frames
from visionloom.data.shards.sample import Image, Video

IMAGE_ROW: Final = 3 * PATCH_SIZE**2
"""Values of an image's patch: (channel, row, column)."""
VIDEO_ROW: Final = IMAGE_ROW * TEMPORAL_PATCH_SIZE
"""Values of a video's patch: (channel, frame, row, column)."""

Read = Callable[[str], bytes]
"""Returns the bytes of a media member; raises SampleError."""
Unit = tuple[int, int, int]
"""Number of the picture or video in its sample, its first temporal patch, and how many: what one rank encodes."""


def decode_patches(
    sample: EncodedSample, read: Read, rules: MediaConfig, units: Sequence[Unit] | None = None
) -> Pixels:
    """Rows of a sample's pictures and videos, in order: uint8 [patches, 768], or 1536 wide if it has a video.

    `units` names those wanted, in order; None means all. Raises SampleError if a member is missing, cannot be decoded or
    differs in size from what the sample says. Equal to transformers' Qwen2VLImageProcessor and Qwen3VLVideoProcessor before
    they rescale, with the rule qwen_utils after qwen-vl-utils has resized.
    """
    units = all_units(sample) if units is None else units
    frames = sample.grids[:, 1].astype(np.int64) * sample.grids[:, 2]
    rows = sum(int(frames[number]) * count for number, _, count in units)
    out = np.empty((rows, row_width(sample.media)), np.uint8)
    decode_into(out, sample, units, read, rules)
    return out


def all_units(sample: EncodedSample) -> list[Unit]:
    """Every picture and video of a sample, whole."""
    return [(number, 0, int(time)) for number, time in enumerate(sample.grids[:, 0])]


def row_width(media: Sequence[Image | Video]) -> int:
    """Values of a row of patches of these pictures and videos together."""
    return VIDEO_ROW if any(isinstance(one, Video) for one in media) else IMAGE_ROW


def decode_into(
    out: Pixels, sample: EncodedSample, units: Sequence[Unit], read: Read, rules: MediaConfig
) -> None:
    """Write the rows of these units into `out`, uint8 [their patches, 768 or 1536]; no other copy of them is made.

    Frames are resized as they are decoded, so no more than one is held at its full size. Raises SampleError like
    `decode_patches`; then `out` is partly written.
    """
    start = 0
    for number, group in groupby(units, key=lambda unit: unit[0]):
        patches = np.concatenate([np.arange(first, first + count) for _, first, count in group])
        _, height, width = sample.grids[number].tolist()
        rows = out[start : start + len(patches) * height * width].reshape(
            len(patches), height * width, -1
        )
        start += rows.shape[0] * rows.shape[1]
        size = (height * PATCH_SIZE, width * PATCH_SIZE)
        media = sample.media[number]
        if isinstance(media, Image):
            put(rows[0], _picture(media, size, sample.sample_id, read, rules))
        else:
            _fill_video(rows, media, patches, size, sample.sample_id, read, rules)


def _picture(
    image: Image, size: tuple[int, int], sample_id: str, read: Read, rules: MediaConfig
) -> Pixels:
    pixels = decode_image(read(image.ref), (image.height, image.width), sample_id, image.ref)
    return resize(resize_by_pillow(pixels, *size) if rules.rule == "qwen_utils" else pixels, *size)


def _fill_video(
    rows: Pixels,
    video: Video,
    patches: NDArray[np.int64],
    size: tuple[int, int],
    sample_id: str,
    read: Read,
    rules: MediaConfig,
) -> None:
    """Write the temporal patches [patches, rows of one, 1536]: two frames each, an odd last frame counts twice."""
    shown = chosen_frames(video, rules)
    slots = np.minimum(
        patches[:, None] * TEMPORAL_PATCH_SIZE + np.arange(TEMPORAL_PATCH_SIZE), len(shown) - 1
    )
    numbers = np.unique(slots)
    decoded = _frames(video, shown[numbers], sample_id, read, rules)
    scaled = resize_in_float if rules.rule == "qwen_utils" else resize
    for number, pixels in zip(numbers.tolist(), decoded, strict=True):
        picture = scaled(pixels, *size)
        for place, slot in np.argwhere(slots == number).tolist():
            put(rows[place], picture, slot)


def _frames(
    video: Video, frames: NDArray[np.int64], sample_id: str, read: Read, rules: MediaConfig
) -> Iterator[Pixels]:
    if video.ref is not None:
        yield from decode_frames(
            read(video.ref), video, frames, frame_times(video, frames), sample_id
        )
        return
    for index in frames.tolist():
        name = video.frames[index]
        pixels = decode_image(read(name), (video.height, video.width), sample_id, name)
        yield resize_by_pillow(pixels, *stored_size(video, rules))


def put(rows: Pixels, picture: Pixels, frame: int | None = None) -> None:
    """Cut planes uint8 [3, height, width] into the rows of one temporal patch, uint8 [patches, 768 or 1536].

    In the order (block row, block column, row, column), a block being 2 x 2 patches. `frame` says which of the two frames of
    a video's row; None fills all there are.
    """
    height, width = (side // (MERGE_SIZE * PATCH_SIZE) for side in picture.shape[1:])
    # The 16 pixels of a patch's line are copied as one 16-byte value: nine times as fast as byte by byte.
    lines = picture.view(np.complex128).reshape(
        3, height, MERGE_SIZE, PATCH_SIZE, width, MERGE_SIZE
    )
    blocks = lines.transpose(1, 4, 2, 5, 0, 3)
    target = rows.view(np.complex128).reshape(
        height, width, MERGE_SIZE, MERGE_SIZE, 3, -1, PATCH_SIZE
    )
    if frame is None:
        target[...] = blocks[..., None, :]
    else:
        target[..., frame, :] = blocks


def widen(rows: Pixels, width: int) -> Pixels:
    """Rows of an image as rows of a video whose two frames are alike, or back, as `width` says."""
    if rows.shape[1] == width:
        return rows
    if width == IMAGE_ROW:
        return rows.reshape(-1, 3, TEMPORAL_PATCH_SIZE, PATCH_SIZE**2)[:, :, 0].reshape(-1, width)
    return np.repeat(rows.reshape(-1, 3, 1, PATCH_SIZE**2), TEMPORAL_PATCH_SIZE, axis=2).reshape(
        -1, width
    )
