"""From encoded pictures and videos to rows of patches, as uint8. Normalisation to -1..1 is left to the device."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    """Return the rows of a sample's pictures and videos, in order: uint8 [patches, 768], or 1536 wide if it has a video.

    Equal to transformers' Qwen2VLImageProcessor and Qwen3VLVideoProcessor before they rescale, with the rule qwen_utils
    after qwen-vl-utils has resized.

    Args:
        sample: encoded.
        read: returns the bytes of a member.
        rules: of sizes and frames.
        units: those wanted, in order; None: all.

    Raises:
        SampleError: if a member is missing, cannot be decoded or differs in size from what the sample says.
    """
    units = all_units(sample) if units is None else units
    frames = sample.grids[:, 1].astype(np.int64) * sample.grids[:, 2]
    rows = sum(int(frames[number]) * count for number, _, count in units)
    out = np.empty((rows, row_width(sample.media)), np.uint8)
    decode_into(out, sample, units, read, rules)
    return out


def all_units(sample: EncodedSample) -> list[Unit]:
    """Return every picture and video of a sample, whole."""
    return [(number, 0, int(time)) for number, time in enumerate(sample.grids[:, 0])]


def row_width(media: Sequence[Image | Video]) -> int:
    """Return the values of a row of patches of these pictures and videos together."""
    return VIDEO_ROW if any(isinstance(one, Video) for one in media) else IMAGE_ROW


def decode_into(
    out: Pixels, sample: EncodedSample, units: Sequence[Unit], read: Read, rules: MediaConfig
) -> None:
    """Write the rows of these units into `out`, uint8 [their patches, 768 or 1536]; no other copy of them is made.

    Raises SampleError like `decode_patches`; then `out` is partly written.
    """
    source = _MediaSource(sample.sample_id, read, rules)
    start = 0
    for number, patches in _by_medium(units):
        _, height, width = sample.grids[number].tolist()
        stop = start + len(patches) * height * width
        rows = out[start:stop].reshape(len(patches), height * width, -1)
        start = stop
        size = (height * PATCH_SIZE, width * PATCH_SIZE)
        source.fill(rows, sample.media[number], patches, size)


def _by_medium(units: Sequence[Unit]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the number of each picture or video, and its wanted temporal patches: int64 [t]."""
    # all runs of one video together: it is decoded once
    for number, group in groupby(units, key=lambda unit: unit[0]):
        yield number, np.concatenate([np.arange(first, first + count) for _, first, count in group])


@dataclass(frozen=True, slots=True)
class _MediaSource:
    """The media of one sample: read, decoded and resized."""

    sample_id: str
    read: Read
    rules: MediaConfig

    def fill(
        self,
        rows: Pixels,
        media: Image | Video,
        patches: NDArray[np.int64],
        size: tuple[int, int],
    ) -> None:
        """Write a picture, or temporal patches of a video (int64 [t]).

        Into rows uint8 [t, patches of one, 768 or 1536].
        """
        if isinstance(media, Image):
            put(rows[0], self.picture(media, size))
        else:
            self.fill_video(rows, media, patches, size)

    def picture(self, image: Image, size: tuple[int, int]) -> Pixels:
        """Return a picture as planes uint8 [3, height, width] of this size."""
        said = (image.height, image.width)
        pixels = decode_image(self.read(image.ref), said, self.sample_id, image.ref)
        if self.rules.rule == "qwen_utils":
            pixels = resize_by_pillow(pixels, *size)
        return resize(pixels, *size)

    def fill_video(
        self,
        rows: Pixels,
        video: Video,
        patches: NDArray[np.int64],
        size: tuple[int, int],
    ) -> None:
        """Write temporal patches (int64 [t]) into rows uint8 [t, patches of one, 1536], two frames each."""
        shown = chosen_frames(video, self.rules)
        slots = self._frames_of_patches(patches, len(shown))
        numbers = np.unique(slots)
        scaled = resize_in_float if self.rules.rule == "qwen_utils" else resize
        # resized as they are decoded, so that no more than one frame is held at its full size
        decoded = self._frames(video, shown[numbers])
        for number, pixels in zip(numbers.tolist(), decoded, strict=True):
            picture = scaled(pixels, *size)
            for place, slot in np.argwhere(slots == number).tolist():
                put(rows[place], picture, slot)

    @staticmethod
    def _frames_of_patches(patches: NDArray[np.int64], shown: int) -> NDArray[np.int64]:
        """Return the two frames of each temporal patch among those shown, int64 [t, 2]."""
        places = patches[:, None] * TEMPORAL_PATCH_SIZE + np.arange(TEMPORAL_PATCH_SIZE)
        # an odd last frame counts twice
        return np.minimum(places, shown - 1)

    def _frames(self, video: Video, frames: NDArray[np.int64]) -> Iterator[Pixels]:
        """Yield the frames of these indices, uint8 [height, width, 3]."""
        if video.ref is not None:
            times = frame_times(video, frames)
            yield from decode_frames(self.read(video.ref), video, frames, times, self.sample_id)
            return
        said, stored = (video.height, video.width), stored_size(video, self.rules)
        for index in frames.tolist():
            name = video.frames[index]
            pixels = decode_image(self.read(name), said, self.sample_id, name)
            yield resize_by_pillow(pixels, *stored)


def put(rows: Pixels, picture: Pixels, frame: int | None = None) -> None:
    """Cut planes uint8 [3, height, width] into the rows of one temporal patch, uint8 [patches, 768 or 1536].

    In the order (block row, block column, row, column), a block being 2 x 2 patches. `frame` says which of the two frames of
    a video's row; None fills all there are.
    """
    height, width = (side // (MERGE_SIZE * PATCH_SIZE) for side in picture.shape[1:])
    # The 16 pixels of a patch's line are copied as one 16-byte value: nine times as fast as byte by byte.
    lines = picture.view(np.complex128)
    lines = lines.reshape(3, height, MERGE_SIZE, PATCH_SIZE, width, MERGE_SIZE)
    blocks = lines.transpose(1, 4, 2, 5, 0, 3)
    target = rows.view(np.complex128).reshape(
        height, width, MERGE_SIZE, MERGE_SIZE, 3, -1, PATCH_SIZE
    )
    if frame is None:
        target[...] = blocks[..., None, :]
    else:
        target[..., frame, :] = blocks


def widen(rows: Pixels, width: int) -> Pixels:
    """Turn rows of an image into those of a video whose two frames are alike, or back.

    uint8 [patches, 768] or [patches, 1536] to [patches, width].
    """
    if rows.shape[1] == width:
        return rows
    if width == IMAGE_ROW:
        frames = rows.reshape(-1, 3, TEMPORAL_PATCH_SIZE, PATCH_SIZE**2)
        return frames[:, :, 0].reshape(-1, width)
    one_frame = rows.reshape(-1, 3, 1, PATCH_SIZE**2)
    return np.repeat(one_frame, TEMPORAL_PATCH_SIZE, axis=2).reshape(-1, width)
