"""Pictures and videos as they go into shards: the original bytes, unless a picture lies on its side or is transparent.

Loaders apply neither EXIF orientation nor transparency on every epoch: it happens once, here, and the sample's meta says
so. Every picture is decoded once, so that a broken one is left out now and not in the middle of a training run.
"""

import io
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from PIL import ExifTags, ImageOps, JpegImagePlugin
from PIL import Image as Pillow

from visionloom.data.convert.skip import Skip
from visionloom.data.encode.geometry import MAX_ASPECT
from visionloom.data.shards.media_header import MediaFacts, probe
from visionloom.data.shards.open_media import (
    MediaError,
    check_work,
    open_picture,
    open_video,
    packets_of,
)
from visionloom.data.shards.tar import LARGEST_MEMBER

SUFFIXES: Final = {
    "PNG": "png",
    "JPEG": "jpg",
    "MPO": "jpg",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
}
"""Formats that the loader reads, and the names of their files. MPO is Pillow's name of a JPEG with more pictures behind it, as
phones write: readers of JPEG take the first."""
JPEG_QUALITY: Final = 95
DEEP: Final = {
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), "16 bits"),
    "I": "32 bits",
    "F": "floats",
}
"""Pillow's modes with more than 8 bits a value."""
_BAND: Final = 256
"""Rows of a picture in double precision at once."""
_LARGEST_JITTER: Final = 0.005
"""Seconds that a frame may be off an even spacing: containers round times to milliseconds or worse."""
VIDEO_SUFFIXES: Final = {
    "mov": "mp4",
    "matroska": "mkv",
    "avi": "avi",
    "mpegts": "ts",
    "mpeg": "mpg",
    "flv": "flv",
    "asf": "wmv",
}
"""The containers that are read, and the names of their files."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture ready for a shard; `change` says what was done to it, None for the original bytes."""

    data: bytes
    suffix: str
    width: int
    height: int
    change: str | None = None


def prepare_image(data: bytes) -> Picture:
    """Check a picture by decoding it; turn it upright and put it on white where needed.

    What is changed is stored as PNG, or as JPEG of quality 95 with its chroma subsampling if it was one. Raises Skip
    for what cannot be decoded, is no picture format, or is too large.
    """
    if len(data) > LARGEST_MEMBER:
        raise Skip("file too large", f"{len(data)} bytes, at most {LARGEST_MEMBER}")
    try:
        picture = open_picture(data)
        if max(picture.size) > MAX_ASPECT * min(picture.size):
            raise Skip(
                "picture too narrow",
                f"{picture.width}x{picture.height} pixels: an aspect ratio of at most {MAX_ASPECT}",
            )
        return _prepare(data, picture)
    except Skip:
        raise
    except MediaError as error:
        raise Skip(error.reason, error.detail) from None
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise Skip("broken picture", f"{type(error).__name__}: {error}") from error


def _prepare(data: bytes, picture: Pillow.Image) -> Picture:
    turn = picture.getexif().get(ExifTags.Base.Orientation, 1)
    changes = [f"EXIF orientation {turn} applied"] if turn in range(2, 9) else []
    if picture.has_transparency_data:
        changes.append("transparency put on white")
    if picture.mode in DEEP:
        changes.append(f"{DEEP[picture.mode]} reduced to 8 bits")
    suffix = SUFFIXES[str(picture.format)]
    if not changes:
        width, height = picture.size
        picture.draft(
            "RGB", (1, 1)
        )  # JPEG: reads all coefficients, but computes an eighth of each side
        picture.convert("RGB")  # what the loader will do
        return Picture(data, suffix, width, height)
    upright = eight_bits(ImageOps.exif_transpose(picture))
    flat = on_white(upright) if upright.has_transparency_data else upright
    written, suffix, how = _written(flat, picture)
    return Picture(written, suffix, flat.width, flat.height, f"{', '.join(changes)}; {how}")


def eight_bits(picture: Pillow.Image) -> Pillow.Image:
    """A picture with more bits a value as one of 8: Pillow's own conversion would clip it to white.

    Whole numbers of 16 bits lose their lower half. In 32 bits and in floats the range is not known from the format: values are
    taken for 0..1 (floats), 0..255 or 0..65535, the smallest that holds them. Raises Skip for values outside of these.
    """
    if picture.mode not in DEEP:
        return picture
    values = np.asarray(picture)
    least, most = float(values.min()), float(values.max())
    factor = 1.0 if most <= 255 else 1 / 256
    if picture.mode.startswith("I;16"):
        factor = 1 / 256
    elif not 0 <= least <= most <= 65535:  # NaN too
        raise Skip(
            "picture of unknown range",
            f"{DEEP[picture.mode]} from {least:g} to {most:g}: 0..1, 0..255 or 0..65535 expected",
        )
    elif picture.mode == "F" and most <= 1:
        factor = 255.0
    narrow = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), _BAND):
        band = values[row : row + _BAND] * np.float64(factor)
        narrow[row : row + _BAND] = np.floor(band) if factor < 1 else band.round()
    return Pillow.fromarray(narrow)


def on_white(picture: Pillow.Image) -> Pillow.Image:
    """The picture without transparency, what lies behind it white."""
    colours = picture.convert("RGBA")
    white = Pillow.new("RGBA", colours.size, (255, 255, 255, 255))
    return Pillow.alpha_composite(white, colours).convert("RGB")


def _written(picture: Pillow.Image, original: Pillow.Image) -> tuple[bytes, str, str]:
    """Bytes, suffix and a description."""
    file = io.BytesIO()
    options: dict[str, Any] = {"icc_profile": original.info.get("icc_profile")}
    if isinstance(original, JpegImagePlugin.JpegImageFile):
        sampling = JpegImagePlugin.get_sampling(original)
        picture.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=max(sampling, 0), **options)
        return file.getvalue(), "jpg", f"stored as JPEG of quality {JPEG_QUALITY}"
    picture.save(file, "PNG", **options)
    return file.getvalue(), "png", "stored as PNG"


@dataclass(frozen=True, slots=True)
class Film:
    """A video file ready for a shard; `times` (seconds from the first frame) only if the frame rate varies."""

    suffix: str
    facts: MediaFacts
    times: tuple[float, ...]


def prepare_video(data: bytes) -> Film:
    """Read a video's header, the times of all its packets, and decode its first frame.

    Raises Skip for what is no video, is stored rotated, or has no times; UserError without PyAV.
    """
    if len(data) > LARGEST_MEMBER:
        raise Skip("file too large", f"{len(data)} bytes, at most {LARGEST_MEMBER}")
    try:
        with open_video(data) as container:
            suffix = VIDEO_SUFFIXES[container.format.name]
            times = _packet_times(container)
            container.seek(0)
            turn = next(container.decode(video=0)).rotation % 360
        if turn:
            raise Skip(
                "video stored rotated",
                f"by {turn} degrees: write it upright first, ffmpeg does so by itself",
            )
        facts = _complete(probe(f"video.{suffix}", data), times)
        check_work(facts.frames, facts.width, facts.height, len(data))
    except MediaError as error:
        raise Skip(error.reason, error.detail) from None
    except (StopIteration, ValueError) as error:
        raise Skip("broken video", f"{type(error).__name__}: {error}") from error
    return Film(suffix, facts, () if _is_even(times, facts.fps) else times)


def _complete(facts: MediaFacts, times: tuple[float, ...]) -> MediaFacts:
    """The header's facts with the true number of frames, and means where the header has no rate or duration."""
    if len(times) < 2 or not times[-1]:
        raise Skip("video of one frame", "store it as a picture")
    fps = facts.fps or (len(times) - 1) / times[-1]
    return replace(
        facts, frames=len(times), fps=fps, duration=facts.duration or times[-1] + 1 / fps
    )


def _packet_times(container: Any) -> tuple[float, ...]:
    """Seconds from the first frame at which each frame is shown, without decoding."""
    stream = container.streams.video[0]
    found = [
        (packet.pts, packet.is_discard, packet.is_corrupt) for packet in packets_of(container)
    ]  # without their bytes
    if stream.frames > len(found) or any(corrupt for _, _, corrupt in found):
        raise Skip("video cut short", f"{len(found)} of {stream.frames} frames are there")
    stamps = [stamp for stamp, discarded, _ in found if not discarded]
    if not stamps or None in stamps:
        raise Skip("video without times", f"{len(stamps)} frames, some without a presentation time")
    stamps.sort()
    return tuple(float((stamp - stamps[0]) * stream.time_base) for stamp in stamps)


def _is_even(times: tuple[float, ...], fps: float) -> bool:
    return fps > 0 and all(
        abs(time - index / fps) <= _LARGEST_JITTER for index, time in enumerate(times)
    )
