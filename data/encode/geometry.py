"""Sizes, grids, frames, timestamps and coordinates: everything about a picture that is known before it is decoded.

Three rules have names: `hf` is the arithmetic of transformers' Qwen2VLImageProcessor and Qwen3VLVideoProcessor, `hf_capped`
the same with their `cap_pixels_per_frame`, `qwen_utils` that of qwen-vl-utils 0.0.14 with image_patch_size 16. Heights and
widths are pixels, limits are areas in pixels (of a whole video: frames x height x width), grids count patches as (time,
height, width).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visionloom.common.errors import UserError, unknown
from visionloom.data.config import MediaConfig
from visionloom.data.shards.sample import Image, Space, Video

VERSION: Final = 2
"""Counts changes of what this file computes: length tables made by another version are not used."""
PATCH_SIZE: Final = 16
TEMPORAL_PATCH_SIZE: Final = 2
MERGE_SIZE: Final = 2
FACTOR: Final = PATCH_SIZE * MERGE_SIZE
MAX_ASPECT: Final = 200
MARGIN: Final = 1.05
"""A frame's upper limit is never below this times its lower one."""
COORDINATES: Final = 1000
"""Boxes and points are written in thousandths of the picture's sides."""

Grid = tuple[int, int, int]
Frames = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """The pixel limits in force: those of the configuration, or the rule's own."""

    image: tuple[int, int] = (65_536, 16_777_216)
    video: tuple[int, int] = (4_096, 25_165_824)
    frame: tuple[int, int] = (131_072, 786_432)


_OWN: Final = {
    "hf": PixelLimits(),
    "hf_capped": PixelLimits(),
    "qwen_utils": PixelLimits(image=(4_096, 16_777_216), video=(0, 235_929_600)),
}


def limits_of(rules: MediaConfig) -> PixelLimits:
    """Return the pixel limits that these settings mean; raises UserError for an unknown rule."""
    own = _OWN.get(rules.rule)
    if own is None:
        raise UserError(unknown("data.media.rule", rules.rule, list(_OWN)))
    return PixelLimits(
        _or_own(rules.image_min_pixels, rules.image_max_pixels, own.image),
        _or_own(rules.video_min_pixels, rules.video_max_pixels, own.video),
        _or_own(rules.frame_min_pixels, rules.frame_max_pixels, own.frame),
    )


def _or_own(
    least: int | None,
    most: int | None,
    own: tuple[int, int],
) -> tuple[int, int]:
    """Return two limits, each its own one where none is set."""
    return _or(least, own[0]), _or(most, own[1])


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


# ---- sizes


def image_size(
    height: int,
    width: int,
    min_pixels: int,
    max_pixels: int,
) -> tuple[int, int]:
    """Return the height and width that an image is resized to by the rules `hf`: multiples of 32, area inside the limits.

    Raises UserError for an aspect ratio above 200. Source: `smart_resize` of transformers' image_processing_qwen2_vl
    (Python's rounding to even included).
    """
    _check_aspect(height, width)
    rounded = _rounded(height, width)
    area = rounded[0] * rounded[1]
    return _inside(rounded, (height, width), (area, height * width), (min_pixels, max_pixels))


def _rounded(height: int, width: int) -> tuple[int, int]:
    # to even at a half, as the reference does: 48 pixels become 64, but 80 become 64 as well
    return round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR


def qwen_utils_size(
    height: int, width: int, min_pixels: int, max_pixels: float, factor: int = FACTOR
) -> tuple[int, int]:
    """Return height and width of a picture, or of a video's frame, by the rule `qwen_utils`: multiples of `factor`.

    Raises UserError for an aspect ratio above 200, or if a side would vanish. Source: `smart_resize` of qwen_vl_utils.
    """
    _check_aspect(height, width)
    rows, columns = (max(factor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        rows = math.floor(height / beta / factor) * factor
        columns = math.floor(width / beta / factor) * factor
    elif rows * columns < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * beta / factor) * factor
        columns = math.ceil(width * beta / factor) * factor
    # unlike transformers, the reference lets a side shrink to nothing
    if not rows or not columns:
        raise UserError(
            f"{width}x{height} pixels are too narrow for an area of {max_pixels:.0f}: crop it or raise the limit"
        )
    return rows, columns


def video_size(
    frames: int, height: int, width: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return the height and width of a video's frames by the rules `hf`: multiples of 32, the volume inside the limits.

    The volume is compared with an even number of frames, the scale is taken from the true one. Raises UserError for
    fewer than two frames or an aspect ratio above 200. Source: `smart_resize` of transformers' video_processing_qwen3_vl.
    """
    if frames < TEMPORAL_PATCH_SIZE:
        raise UserError(_too_few(frames))
    # a side below one visual token is enlarged before its shape is judged
    if height < FACTOR or width < FACTOR:
        scale = max(FACTOR / height, FACTOR / width)
        height, width = int(height * scale), int(width * scale)
    _check_aspect(height, width)
    rounded = _rounded(height, width)
    even = round(frames / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE
    volumes = even * rounded[0] * rounded[1], frames * height * width
    return _inside(rounded, (height, width), volumes, (min_pixels, max_pixels))


def frame_size(video: Video, frames: int, rules: MediaConfig) -> tuple[int, int]:
    """Return height and width of a video's frames when `frames` of them are shown; its own total_pixels can only narrow.

    Raises UserError for fewer than two frames or an impossible shape. Sources: `resize` of transformers'
    Qwen3VLVideoProcessor, `fetch_video` of qwen_vl_utils.
    """
    limits = limits_of(rules)
    most = min(limits.video[1], _or(video.total_pixels, limits.video[1]))
    if frames < TEMPORAL_PATCH_SIZE:
        raise UserError(_too_few(frames))
    if rules.rule == "qwen_utils":
        # the reference repeats an odd last frame before it divides
        shown = frames + frames % TEMPORAL_PATCH_SIZE
        least = limits.frame[0]
        frame_pixels = max(min(limits.frame[1], most / shown), int(least * MARGIN))
        height, width = stored_size(video, rules)
        return qwen_utils_size(height, width, least, frame_pixels)

    least = min(limits.video[0], most)
    if rules.rule == "hf_capped":
        frame_pixels = max(min(limits.frame[1], most // frames), int(least * MARGIN))
        most = frame_pixels * frames
    return video_size(frames, video.height, video.width, least, most)


def stored_size(video: Video, rules: MediaConfig) -> tuple[int, int]:
    """Return height and width of a video's frames before they are resized together.

    qwen-vl-utils loads extracted frames as images, with twice the factor; only then are they resized as a video.
    """
    if rules.rule != "qwen_utils" or video.ref is not None:
        return video.height, video.width
    # twice the factor of a side, so four times the area
    least, most = (pixels * 4 for pixels in _OWN["qwen_utils"].image)
    return qwen_utils_size(video.height, video.width, least, most, 2 * FACTOR)


def _too_few(frames: int) -> str:
    return (
        f"a video needs at least {TEMPORAL_PATCH_SIZE} frames, got {frames}: store it as an image"
    )


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise UserError(f"aspect ratio of {width}x{height} pixels is above {MAX_ASPECT}: crop it")


def _inside(
    rounded: tuple[int, int],
    size: tuple[int, int],
    volumes: tuple[int, int],
    limits: tuple[int, int],
) -> tuple[int, int]:
    """Scale a size into the limits.

    Args:
        rounded: the size (height, width) as it stays if it is inside.
        size: the true one.
        volumes: of the rounded size, which is compared, and of the true one, which the scale is taken from.
        limits: least and most.
    """
    height, width = size
    compared, true = volumes
    if compared > limits[1]:
        # both sides by the same factor keep the shape
        beta = math.sqrt(true / limits[1])
        return _floor(height / beta), _floor(width / beta)
    if compared < limits[0]:
        beta = math.sqrt(limits[0] / true)
        return _ceil(height * beta), _ceil(width * beta)
    return rounded


def _ceil(side: float) -> int:
    return math.ceil(side / FACTOR) * FACTOR


def _floor(side: float) -> int:
    return max(FACTOR, math.floor(side / FACTOR) * FACTOR)


# ---- frames


def chosen_frames(video: Video, rules: MediaConfig) -> Frames:
    """Return the indices of the frames that are shown (int64, ascending) among all frames of the video.

    From a file: video_fps a second, evenly spread over what lies between its start and end, both ends included. Extracted
    frames were sampled once already: all of them, or as many as its own sample_fps and the most frames allow. Where every
    frame's time is known, frames are spread evenly in time instead of in number, each at most once. Raises UserError for
    fewer than two frames. Sources: `sample_frames` of transformers' Qwen3VLVideoProcessor, `smart_nframes` and
    `calculate_video_frame_range` of qwen_vl_utils.
    """
    first, last = _part(video)
    total = last - first + 1
    if total < TEMPORAL_PATCH_SIZE:
        raise UserError(_too_few(max(total, 0)))
    times = np.array(video.times[first : last + 1])
    most = min(rules.video_max_frames, _or(video.max_frames, rules.video_max_frames))
    seconds = _seconds(video, times, total)
    wanted = frames_wanted(total, seconds, _rate(video, rules), most, rules)
    # extracted frames without a rate of their own are all shown, so their times choose nothing
    if not len(times) or (video.ref is None and video.sample_fps is None):
        return _spread(first, last, wanted, rules)
    return first + _spread_in_time(times, wanted, rules)


def frames_wanted(
    total: int,
    seconds: float,
    rate: float,
    most: int,
    rules: MediaConfig,
) -> int:
    """Return how many of `total` frames lasting `seconds` are taken at `rate` frames a second, `most` at most."""
    if rules.rule != "qwen_utils" or math.isinf(rate):
        wanted = total if math.isinf(rate) else int(seconds * rate)
        return min(max(wanted, min(rules.video_min_frames, most)), most, total)
    least = -(-rules.video_min_frames // TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE
    most = min(most, total) // TEMPORAL_PATCH_SIZE * TEMPORAL_PATCH_SIZE
    bounded_count = min(max(seconds * rate, least), most, total)
    return math.floor(bounded_count / TEMPORAL_PATCH_SIZE) * TEMPORAL_PATCH_SIZE


def _part(video: Video) -> tuple[int, int]:
    """Return the first and last frame between the video's start and end."""
    first, last = 0, video.frame_count - 1
    if video.times:
        if video.start is not None:
            first = int(np.searchsorted(video.times, video.start, side="left"))
        if video.end is not None:
            last = int(np.searchsorted(video.times, video.end, side="right")) - 1
        return first, last

    # a start or end after the video's own end means its end
    longest = video.frame_count / video.fps
    if video.start is not None:
        first = math.ceil(min(video.start, longest) * video.fps)
    if video.end is not None:
        last = min(math.floor(min(video.end, longest) * video.fps), last)
    return first, last


def _rate(video: Video, rules: MediaConfig) -> float:
    """Return the frames taken per second; infinite: all."""
    own = math.inf if video.sample_fps is None else video.sample_fps
    return own if video.ref is None else min(rules.video_fps, own)


def _seconds(video: Video, times: NDArray[np.float64], total: int) -> float:
    """Return how long the frames last, in seconds, the last one's own time included."""
    if not len(times):
        return total / video.fps
    # one mean distance more than from first to last, so that even times give total / fps
    between = float(times[-1] - times[0])
    return round(between * total / (total - 1), 6)


def _spread(first: int, last: int, wanted: int, rules: MediaConfig) -> Frames:
    """Spread frames evenly in number from first to last, both included: int64 [wanted]."""
    if rules.rule != "qwen_utils":
        return first + np.linspace(0, last - first, wanted).round().astype(np.int64)
    # torch.linspace in float32 from both ends, each term one fused multiply-add: a float64 product is exact here.
    step = np.float64(np.float32(last - first) / np.float32(wanted - 1))
    count = np.arange(wanted)
    from_first = first + step * count
    from_last = last - step * (wanted - 1 - count)
    places = np.where(count < wanted // 2, from_first, from_last)
    return places.astype(np.float32).round().astype(np.int64)


def _spread_in_time(times: NDArray[np.float64], wanted: int, rules: MediaConfig) -> Frames:
    """Return the frames nearest to evenly spread moments, each once: int64, at most `wanted`.

    They are spread in number where these are too few, as in a recording that stood still.
    """
    moments = np.linspace(times[0], times[-1], wanted)
    places = np.interp(moments, times, np.arange(len(times)))
    nearest = np.unique(places.round().astype(np.int64))
    least = max(min(rules.video_min_frames, wanted), TEMPORAL_PATCH_SIZE)
    if len(nearest) < least:
        return _spread(0, len(times) - 1, least, rules)
    if rules.rule == "qwen_utils" and len(nearest) % TEMPORAL_PATCH_SIZE:
        # the reference shows an even number
        return nearest[_spread(0, len(nearest) - 1, len(nearest) - 1, rules)]
    return nearest


def frame_times(video: Video, frames: Frames) -> list[float]:
    """Return the seconds at which these frames are shown."""
    if video.times:
        return [video.times[index] for index in frames.tolist()]
    return [index / video.fps for index in frames.tolist()]


def patch_timestamps(times: Sequence[float]) -> list[float]:
    """Return the seconds of each temporal patch: the mean of its two frames' times.

    Source: `Qwen3VLProcessor._calculate_timestamps` of transformers.
    """
    padded = list(times)
    # an odd last frame counts twice
    if len(padded) % TEMPORAL_PATCH_SIZE:
        padded.append(times[-1])
    pairs = zip(padded[::2], padded[1::2], strict=True)
    return [(first + last) / 2 for first, last in pairs]


# ---- grids


def image_grid(image: Image, rules: MediaConfig) -> Grid:
    """Return the patches (1, height, width) of an image; its own pixel limits can only narrow the configured ones."""
    limits = limits_of(rules).image
    most = min(limits[1], _or(image.max_pixels, limits[1]))
    # own limits of an image may contradict each other: the upper one counts
    least = min(most, max(limits[0], _or(image.min_pixels, limits[0])))
    size = qwen_utils_size if rules.rule == "qwen_utils" else image_size
    height, width = size(image.height, image.width, least, most)
    return 1, height // PATCH_SIZE, width // PATCH_SIZE


def video_grid(video: Video, rules: MediaConfig) -> Grid:
    """Return the patches (time, height, width) of a video."""
    return _video_grid(video, len(chosen_frames(video, rules)), rules)


def _video_grid(video: Video, frames: int, rules: MediaConfig) -> Grid:
    height, width = frame_size(video, frames, rules)
    return -(-frames // TEMPORAL_PATCH_SIZE), height // PATCH_SIZE, width // PATCH_SIZE


def video_layout(video: Video, rules: MediaConfig) -> tuple[Grid, list[float]]:
    """Return the grid of a video and the seconds of each of its temporal patches."""
    frames = chosen_frames(video, rules)
    return _video_grid(video, len(frames), rules), patch_timestamps(frame_times(video, frames))


def grid_of(media: Image | Video, rules: MediaConfig) -> Grid:
    """Return the patches (time, height, width) of an image or a video; raises UserError if it has none."""
    return image_grid(media, rules) if isinstance(media, Image) else video_grid(media, rules)


def tokens_per_frame(grid: Grid) -> int:
    """Return the visual tokens of one temporal patch: 2 x 2 patches are merged into one."""
    return grid[1] * grid[2] // MERGE_SIZE**2


def scale_coordinate(value: float, side: int, space: Space) -> int:
    """Return a coordinate in pixels or thousandths as an integer 0..1000 of the side, rounded and clamped."""
    relative = value if space == "relative1000" else value / side * COORDINATES
    return min(max(round(relative), 0), COORDINATES)
