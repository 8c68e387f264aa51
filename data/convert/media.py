"""Pictures and videos as they go into shards: the original bytes, unless a picture is stored on its side or is transparent.

Loaders apply neither EXIF orientation nor transparency in every epoch: it happens once, here, and is noted in the sample's
meta. Every picture is decoded once, so that a broken one is left out now and not in the middle of a training run.
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
"""Formats that the loader reads, and the names of their files. MPO is Pillow's name of a JPEG with more pictures after it, as
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
    """A picture ready for a shard; `change` describes what was done to it, None for the original bytes."""

    data: bytes
    suffix: str
    width: int
    height: int
    change: str | None = None


def prepare_image(data: bytes) -> Picture:
    """Check a picture by decoding it; turn it upright and put it on white where needed.

    A changed picture is stored as PNG, or as JPEG of quality 95 with its chroma subsampling if it was one. Raises Skip
    for bytes that cannot be decoded, are of no picture format, or are too large.
    """
    if len(data) > LARGEST_MEMBER:
        raise Skip("file too large", f"{len(data)} bytes, at most {LARGEST_MEMBER}")
    try:
        picture = open_picture(data)
        if max(picture.size) > MAX_ASPECT * min(picture.size):
            size = f"{picture.width}x{picture.height} pixels"
            raise Skip("picture too narrow", f"{size}: an aspect ratio of at most {MAX_ASPECT}")
        return _decoded(data, picture)
    except Skip:
        raise
    except MediaError as error:
        raise Skip(error.reason, error.detail) from None
    except Exception as error:
        # Decoders raise any error that damaged bytes lead them to.
        raise Skip("broken picture", f"{type(error).__name__}: {error}") from error


def _decoded(data: bytes, picture: Pillow.Image) -> Picture:
    """Decode a picture, and write it anew if it must be changed."""
    turn = picture.getexif().get(ExifTags.Base.Orientation, 1)
    changes = [f"EXIF orientation {turn} applied"] if turn in range(2, 9) else []
    if picture.has_transparency_data:
        changes.append("transparency put on white")
    if picture.mode in DEEP:
        changes.append(f"{DEEP[picture.mode]} reduced to 8 bits")

    if not changes:
        width, height = picture.size
        # A JPEG reads all coefficients, but computes an eighth of each side.
        picture.draft("RGB", (1, 1))
        # As the loader will.
        picture.convert("RGB")
        return Picture(data, SUFFIXES[str(picture.format)], width, height)

    upright = eight_bits(ImageOps.exif_transpose(picture))
    flat = on_white(upright) if upright.has_transparency_data else upright
    content, suffix, stored = _written(flat, picture)
    return Picture(content, suffix, flat.width, flat.height, f"{', '.join(changes)}; {stored}")


def eight_bits(picture: Pillow.Image) -> Pillow.Image:
    """Reduce a picture with more bits a value to 8: Pillow's own conversion would clip it to white.

    Whole numbers of 16 bits lose their lower half. In 32 bits and in floats the range is not known from the format: values are
    taken for 0..1 (floats), 0..255 or 0..65535, the smallest that holds them. Raises Skip for values outside of these.
    """
    if picture.mode not in DEEP:
        return picture
    values = np.asarray(picture)
    factor = _factor(picture.mode, float(values.min()), float(values.max()))
    # In bands: doubles of a whole picture would take eight times its size.
    narrow = np.empty(values.shape, np.uint8)
    for row in range(0, len(values), _BAND):
        band = values[row : row + _BAND] * np.float64(factor)
        narrow[row : row + _BAND] = np.floor(band) if factor < 1 else band.round()
    return Pillow.fromarray(narrow)


def _factor(mode: str, least: float, most: float) -> float:
    """Return the factor that brings values of a deep mode, from `least` to `most`, to 0..255; raises Skip."""
    if mode.startswith("I;16"):
        return 1 / 256
    # NaN fails this too.
    if not 0 <= least <= most <= 65535:
        values = f"{DEEP[mode]} from {least:g} to {most:g}"
        problem = f"{values}: 0..1, 0..255 or 0..65535 expected"
        raise Skip("picture of unknown range", problem)
    if mode == "F" and most <= 1:
        return 255.0
    return 1.0 if most <= 255 else 1 / 256


def on_white(picture: Pillow.Image) -> Pillow.Image:
    """Return the picture without transparency, on a white ground."""
    colours = picture.convert("RGBA")
    # Blended in full precision, not cut at half.
    white = Pillow.new("RGBA", colours.size, (255, 255, 255, 255))
    return Pillow.alpha_composite(white, colours).convert("RGB")


def _written(picture: Pillow.Image, original: Pillow.Image) -> tuple[bytes, str, str]:
    """Return the picture in the format of the original: bytes, suffix and a description."""
    file = io.BytesIO()
    profile = original.info.get("icc_profile")
    if isinstance(original, JpegImagePlugin.JpegImageFile):
        # -1 is an unknown one.
        sampling = max(JpegImagePlugin.get_sampling(original), 0)
        options = {"quality": JPEG_QUALITY, "subsampling": sampling}
        picture.save(file, "JPEG", icc_profile=profile, **options)
        return file.getvalue(), "jpg", f"stored as JPEG of quality {JPEG_QUALITY}"
    picture.save(file, "PNG", icc_profile=profile)
    return file.getvalue(), "png", "stored as PNG"


@dataclass(frozen=True, slots=True)
class Film:
    """A video file ready for a shard; `times` (seconds from the first frame) only if the frame rate varies."""

    suffix: str
    facts: MediaFacts
    times: tuple[float, ...]


def prepare_video(data: bytes) -> Film:
    """Read a video's header, the times of all its packets, and decode its first frame.

    Raises Skip for bytes that are no video, one that is stored rotated, or has no times; UserError without PyAV.
    """
    if len(data) > LARGEST_MEMBER:
        raise Skip("file too large", f"{len(data)} bytes, at most {LARGEST_MEMBER}")
    try:
        with open_video(data) as container:
            suffix = VIDEO_SUFFIXES[container.format.name]
            times = _packet_times(container)
            # Reading the packets went to the end.
            container.seek(0)
            turn = next(container.decode(video=0)).rotation % 360
        if turn:
            fix = "write it upright first, ffmpeg does so by itself"
            raise Skip("video stored rotated", f"by {turn} degrees: {fix}")

        facts = _complete(probe(f"video.{suffix}", data), times)
        check_work(facts.frames, facts.width, facts.height, len(data))
    except MediaError as error:
        raise Skip(error.reason, error.detail) from None
    except (StopIteration, ValueError) as error:
        raise Skip("broken video", f"{type(error).__name__}: {error}") from error

    for index, time in enumerate(times):
        if not facts.fps or abs(time - index / facts.fps) > _LARGEST_JITTER:
            return Film(suffix, facts, times)
    return Film(suffix, facts, ())


def _complete(facts: MediaFacts, times: tuple[float, ...]) -> MediaFacts:
    """Return the header's facts with the true number of frames, and means where it has no rate or duration."""
    if len(times) < 2 or not times[-1]:
        raise Skip("video of one frame", "store it as a picture")
    fps = facts.fps or (len(times) - 1) / times[-1]
    duration = facts.duration or times[-1] + 1 / fps
    return replace(facts, frames=len(times), fps=fps, duration=duration)


def _packet_times(container: Any) -> tuple[float, ...]:
    """Return the seconds from the first frame at which each frame is shown, without decoding."""
    stream = container.streams.video[0]
    count, corrupt = 0, 0
    stamps: list[int | None] = []
    # Packets are not kept: they hold their bytes.
    for packet in packets_of(container):
        count += 1
        corrupt += packet.is_corrupt
        if not packet.is_discard:
            stamps.append(packet.pts)

    if stream.frames > count or corrupt:
        raise Skip("video cut short", f"{count} of {stream.frames} frames are there")
    known = sorted(stamp for stamp in stamps if stamp is not None)
    if not known or len(known) < len(stamps):
        problem = f"{len(stamps)} frames, some without a presentation time"
        raise Skip("video without times", problem)
    return tuple(float((stamp - known[0]) * stream.time_base) for stamp in known)
