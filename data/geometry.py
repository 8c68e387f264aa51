"""Sizes, grids, frames, timestamps and coordinates: everything about a picture that is known before it is decoded.

The rule is named `hf`: the one of transformers' Qwen2VLImageProcessor and Qwen3VLVideoProcessor. Heights and widths are
pixels, limits are areas in pixels (for a video: frames x height x width), grids count patches as (time, height, width).
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visionloom.data.config import MediaConfig
from visionloom.data.sample import Image, Space, Video
from visionloom.parallel.errors import UserError

RULE: Final = "hf"
PATCH_SIZE: Final = 16
TEMPORAL_PATCH_SIZE: Final = 2
MERGE_SIZE: Final = 2
FACTOR: Final = PATCH_SIZE * MERGE_SIZE
MAX_ASPECT: Final = 200
COORDINATES: Final = 1000
"""Boxes and points are written in thousandths of the picture's sides."""

Grid = tuple[int, int, int]


def image_size(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that an image is resized to: multiples of 32 with an area inside the limits.

    Raises UserError for an aspect ratio above 200. Source: `smart_resize` of transformers' image_processing_qwen2_vl
    (Python's rounding to even included).
    """
    _check_aspect(height, width)
    rounded = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR
    return _inside(rounded, height, width, rounded[0] * rounded[1], height * width, (min_pixels, max_pixels))


def video_size(frames: int, height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width that the frames of a video are resized to: multiples of 32, the volume inside the limits.

    The volume is compared with an even number of frames, the scale is taken from the true one. Raises UserError for
    fewer than two frames or an aspect ratio above 200. Source: `smart_resize` of transformers' video_processing_qwen3_vl.
    """
    if frames < TEMPORAL_PATCH_SIZE:
        raise UserError(f"a video needs at least {TEMPORAL_PATCH_SIZE} frames, got {frames}: store it as an image")
    if height < FACTOR or width < FACTOR:
        scale = max(FACTOR / height, FACTOR / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect(height, width)
    rounded = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR
    volume = round(frames / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE * rounded[0] * rounded[1]
    return _inside(rounded, height, width, volume, frames * height * width, (min_pixels, max_pixels))


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise UserError(f"aspect ratio of {width}x{height} pixels is above {MAX_ASPECT}: crop it")


def _inside(
    rounded: tuple[int, int], height: int, width: int, volume: int, true_volume: int, limits: tuple[int, int]
) -> tuple[int, int]:
    if volume > limits[1]:
        beta = math.sqrt(true_volume / limits[1])
        return _floor(height / beta), _floor(width / beta)
    if volume < limits[0]:
        beta = math.sqrt(limits[0] / true_volume)
        return math.ceil(height * beta / FACTOR) * FACTOR, math.ceil(width * beta / FACTOR) * FACTOR
    return rounded


def _floor(side: float) -> int:
    return max(FACTOR, math.floor(side / FACTOR) * FACTOR)


def frame_indices(total: int, source_fps: float, rules: MediaConfig) -> NDArray[np.int64]:
    """Indices of the frames taken from a video of `total` frames: video_fps a second, evenly spread, both ends included.

    Source: `sample_frames` of transformers' Qwen3VLVideoProcessor.
    """
    wanted = int(total / source_fps * rules.video_fps)
    return _spread(total, min(max(wanted, rules.video_min_frames), rules.video_max_frames, total))


def _spread(total: int, wanted: int) -> NDArray[np.int64]:
    return np.linspace(0, total - 1, wanted).round().astype(np.int64)


def chosen_frames(video: Video, rules: MediaConfig) -> NDArray[np.int64]:
    """Indices into the extracted frames: all of them, or video_max_frames evenly spread ones.

    Extracted frames were sampled once already, so video_fps is not applied again.
    """
    return _spread(len(video.frames), min(len(video.frames), rules.video_max_frames))


def patch_timestamps(times: Sequence[float]) -> list[float]:
    """Seconds of each temporal patch: the mean of its two frames' times; an odd last frame counts twice.

    Source: `Qwen3VLProcessor._calculate_timestamps` of transformers.
    """
    padded = [*times, times[-1]] if len(times) % TEMPORAL_PATCH_SIZE else list(times)
    return [(first + last) / 2 for first, last in zip(padded[::2], padded[1::2], strict=True)]


def image_grid(image: Image, rules: MediaConfig) -> Grid:
    """Patches (1, height, width) of an image; its own pixel limits can only narrow the configured ones."""
    most = min(rules.image_max_pixels, image.max_pixels or rules.image_max_pixels)
    least = min(most, max(rules.image_min_pixels, image.min_pixels or rules.image_min_pixels))
    height, width = image_size(image.height, image.width, least, most)
    return 1, height // PATCH_SIZE, width // PATCH_SIZE


def video_grid(video: Video, rules: MediaConfig) -> Grid:
    """Patches (time, height, width) of a video."""
    frames = len(chosen_frames(video, rules))
    height, width = video_size(frames, video.height, video.width, rules.video_min_pixels, rules.video_max_pixels)
    return -(-frames // TEMPORAL_PATCH_SIZE), height // PATCH_SIZE, width // PATCH_SIZE


def grid_of(media: Image | Video, rules: MediaConfig) -> Grid:
    """Patches (time, height, width) of an image or a video; raises UserError if it has none."""
    return image_grid(media, rules) if isinstance(media, Image) else video_grid(media, rules)


def tokens_per_frame(grid: Grid) -> int:
    """Visual tokens of one temporal patch: 2 x 2 patches are merged into one."""
    return grid[1] * grid[2] // MERGE_SIZE**2


def scale_coordinate(value: float, side: int, space: Space) -> int:
    """A coordinate in pixels or thousandths as an integer 0..1000 of the side, rounded and clamped."""
    relative = value if space == "relative1000" else value / side * COORDINATES
    return min(max(round(relative), 0), COORDINATES)
