"""Pictures and videos that strangers made, opened within limits: the only place that calls Pillow's and PyAV's open.

What a file is, its first bytes say, never its name and never a guess: other formats that the libraries know are not tried, so that
a playlist cannot make FFmpeg play a file of this machine. A video that asks for another file, by whatever means its container has,
is refused. What a small file can cost is bounded by what its header claims, before anything is decoded.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from visionloom.common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image as Pillow

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's names of the picture formats that are read; it knows them by their first bytes."""
CONTAINERS: Final = {
    "mov": re.compile(rb".{4}(?:ftyp|styp|moov|moof|mdat|free|skip|wide|pnot)", re.DOTALL),
    "matroska": re.compile(rb"\x1aE\xdf\xa3"),
    "avi": re.compile(rb"RIFF.{4}AVI[ X\x19]", re.DOTALL),
    "mpegts": re.compile(rb"(?:.{4})?G.{187}(?:.{4})?G", re.DOTALL),
    "mpeg": re.compile(rb"\x00\x00\x01\xba"),
    "flv": re.compile(rb"FLV\x01"),
    "asf": re.compile(rb"0&\xb2u\x8ef\xcf\x11\xa6\xd9\x00\xaa\x00b\xcel"),
}
"""FFmpeg's names of the containers that are read, and how they begin: MP4 and QuickTime, Matroska and WebM, AVI, MPEG, Flash, WMV."""
VIDEO_CODECS: Final = (
    *(
        "h264",
        "hevc",
        "vvc",
        "av1",
        "libdav1d",
        "libaom-av1",
        "vp8",
        "vp9",
        "libvpx",
        "libvpx-vp9",
        "vp6",
        "vp6a",
        "vp6f",
    ),
    *(
        "mpeg1video",
        "mpeg2video",
        "mpegvideo",
        "mpeg4",
        "msmpeg4v1",
        "msmpeg4v2",
        "msmpeg4",
        "h261",
        "h263",
        "h263i",
        "h263p",
    ),
    *(
        "flv",
        "wmv1",
        "wmv2",
        "wmv3",
        "vc1",
        "theora",
        "svq1",
        "svq3",
        "mjpeg",
        "png",
        "rawvideo",
        "dvvideo",
        "prores",
        "dnxhd",
    ),
    *(
        "cfhd",
        "ffv1",
        "huffyuv",
        "ffvhuff",
        "utvideo",
        "magicyuv",
        "qtrle",
        "rpza",
        "cinepak",
        "indeo3",
        "indeo4",
        "indeo5",
    ),
)
"""FFmpeg's decoders that are used; others know formats in which nobody keeps videos, text screens among them."""
_AUDIO_CODECS: Final = (
    *(
        "aac",
        "aac_latm",
        "ac3",
        "eac3",
        "mp2",
        "mp2float",
        "mp3",
        "mp3float",
        "opus",
        "vorbis",
        "flac",
        "alac",
    ),
    *(
        "wmav1",
        "wmav2",
        "amrnb",
        "amrwb",
        "pcm_s16le",
        "pcm_s16be",
        "pcm_u8",
        "pcm_s24le",
        "adpcm_ms",
        "adpcm_ima_wav",
    ),
)
"""Sound is not read, but without its decoder FFmpeg looks through megabytes for what a stream of it is."""
MAX_PIXELS: Final = 1 << 27
"""Larger pictures (134 million pixels, 400 MB decoded) are refused from their header."""
UNCHECKED_PIXELS: Final = 1 << 25
"""Pictures up to this size may be as well compressed as they like: decoded and laid on white, one takes 0.8 GB at most."""
PIXELS_PER_BYTE: Final = 64
"""Of larger pictures: photographs have 2 to 30, screenshots of one colour thousands."""
FRAME_PIXELS: Final = 8192 * 4352
"""Of a video: the largest frame of any level of HEVC, VP9 and AV1 (35,651,584)."""
MAX_FRAMES: Final = 1 << 20
"""Of a video: nearly ten hours at 30 frames a second."""
UNCHECKED_WORK: Final = 1 << 32
"""Pixels of all frames that any video may have: 2,000 of 1920 x 1080, seconds of decoding."""
WORK_PER_BYTE: Final = 1 << 17
"""Pixels of all frames for each byte of a longer video: a frame of 1920 x 1080 has at least 16 bytes."""
_SCANS: Final = 100
"""Of a JPEG: progressive ones have about ten."""
_COMMENTS: Final = 1 << 20
"""Bytes of a GIF in front of its first picture: Pillow copies a comment anew for each 255 bytes of it."""
_TIFF: Final[dict[bytes, tuple[Literal["little", "big"], int, int, int, int]]] = {
    b"II*\0": ("little", 4, 2, 12, 4),
    b"MM\0*": ("big", 4, 2, 12, 4),
    b"II\0*": ("little", 4, 2, 12, 4),
    b"MM*\0": ("big", 4, 2, 12, 4),
    b"II+\0": ("little", 8, 8, 20, 8),
    b"MM\0+": ("big", 8, 8, 20, 8),
}
"""How TIFF begins: byte order, where the first directory's offset stands, and the bytes of a count, an entry and an offset."""
_TIFF_TYPES: Final = {
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
"""Bytes of a value of each type; of those that are not here one."""
_POINTERS: Final = (330, 34665, 34853, 40965)
"""Tags whose value is where another directory stands, those that Pillow follows."""
_DIRECTORIES: Final = 64
_LARGEST_VALUES: Final = 1 << 16
"""Bytes: small files may say more of themselves than they hold."""
_MAX_STREAMS: Final = 64
_CODED_MARGIN: Final = 512
"""Pixels by which the sides that are coded may exceed those that are shown."""


class MediaError(ValueError):
    """A picture or video that is not opened or decoded: `reason` in a few words, `detail` with the numbers."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


# ---- pictures


def open_picture(data: bytes) -> "Pillow.Image":
    """A picture, its header read and nothing decoded; of several in a file the first, the others are never looked at.

    Raises MediaError for another format, a damaged header, and for more pixels or scans than its bytes can be true of.
    """
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    _check_before(data)
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # of too many pixels, which are counted below, and of odd metadata
            picture = Pillow.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise MediaError(
            "no picture that is known", f"it is none of {', '.join(FORMATS)}"
        ) from None
    except Pillow.DecompressionBombError as error:
        raise MediaError("picture too large", str(error)) from None
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        raise MediaError("broken picture", f"{type(error).__name__}: {error}") from error
    check_pixels(picture.width, picture.height, len(data))
    _check_tiles(picture)
    if isinstance(exif := picture.info.get("exif"), bytes):
        _check_directories(exif.removeprefix(b"Exif\0\0"))
    return picture


def check_pixels(width: int, height: int, size: int) -> None:
    """Raise MediaError for a picture of `size` bytes that has too many pixels, at all or for its bytes."""
    pixels = width * height
    if pixels > MAX_PIXELS:
        raise MediaError(
            "picture too large", f"{width}x{height} pixels are too many: at most {MAX_PIXELS}"
        )
    if pixels > max(UNCHECKED_PIXELS, size * PIXELS_PER_BYTE):
        raise MediaError(
            "picture too large",
            f"{width}x{height} pixels are too many for {size} bytes: above {UNCHECKED_PIXELS} at most {PIXELS_PER_BYTE} a byte",
        )


def check_scans(data: bytes, width: int, height: int) -> None:
    """Raise MediaError for a JPEG whose scans would take long to decode, as each goes over the whole picture."""
    if (scans := data.count(b"\xff\xda")) > _SCANS and scans * width * height > UNCHECKED_WORK:
        raise MediaError("picture too large", f"{scans} scans of {width}x{height} pixels")


def _check_before(data: bytes) -> None:
    """What Pillow does not bound while it reads a header."""
    if data[:2] == b"\xff\xd8":
        check_scans(data, *_jpeg_size(data))
    if data[:4] in _TIFF:
        _check_directories(data)
    if (
        data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X"
    ):  # both canvases are allocated when it is opened
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        check_pixels(width, height, len(data))
    if data[:4] == b"GIF8" and (found := _before_first_picture(data)) > _COMMENTS:
        raise MediaError("broken picture", f"{found} bytes of comments, at most {_COMMENTS}")


def _check_directories(data: bytes) -> None:
    """Raise MediaError for directories of a TIFF, or of EXIF, whose values together are larger than the file.

    Pillow copies the value of each tag; tens of thousands of tags may name the same megabyte.
    """
    if (layout := _TIFF.get(data[:4])) is None:
        return
    order, head, count_size, entry_size, offset_format = layout
    waiting, seen, total = [int.from_bytes(data[head : head + offset_format], order)], set[int](), 0
    while waiting and len(seen) < _DIRECTORIES:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        entries = int.from_bytes(data[place : place + count_size], order)
        for at in range(
            place + count_size,
            min(place + count_size + entries * entry_size, len(data)),
            entry_size,
        ):
            tag, kind = (int.from_bytes(data[start : start + 2], order) for start in (at, at + 2))
            number = int.from_bytes(data[at + 4 : at + 4 + offset_format], order)
            total += number * _TIFF_TYPES.get(kind, 1)
            if tag in _POINTERS:
                waiting.append(
                    int.from_bytes(data[at + 4 + offset_format : at + 4 + 2 * offset_format], order)
                )
        if total > 2 * len(data) + _LARGEST_VALUES:
            raise MediaError("broken picture", f"tags of {total} bytes in {len(data)}")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height by the largest frame header in a JPEG; what is not one by chance only makes the limit tighter."""
    found = re.finditer(rb"\xff[\xc0\xc1\xc2\xc9\xca]..\x08(..)(..)", data[: 1 << 20], re.DOTALL)
    sizes = [(int.from_bytes(one[2]), int.from_bytes(one[1])) for one in found]
    return max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))


def _before_first_picture(data: bytes) -> int:
    """Bytes of a GIF's extensions before its first picture."""
    start = place = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    while data[place : place + 1] == b"!":
        place += 2
        while place < len(data) and data[place]:
            place += data[place] + 1
        place += 1
    return place - start


def _check_tiles(picture: "Pillow.Image") -> None:
    """Raise MediaError for tiles of a TIFF that are much larger than the picture: a buffer of their size is filled."""
    tags = getattr(picture, "tag_v2", {})
    sides = [side for number in (322, 323) if isinstance(side := tags.get(number), int)]
    if any(side > max(picture.size) + 4096 for side in sides):
        raise MediaError(
            "broken picture",
            f"tiles of {sides} pixels in a picture of {picture.width}x{picture.height}",
        )


# ---- videos


@contextmanager
def open_video(data: bytes) -> Iterator[Any]:
    """PyAV's container of a video file, its header read, at least one video stream in it, its decoder within limits.

    Raises MediaError, also for every error of FFmpeg while it is open; UserError without PyAV.
    """
    try:
        import av
    except ImportError:
        raise UserError("video files need PyAV: pip install 'visionloom[video]'") from None
    kind = container_of(data)
    if kind == "mov":
        _check_tables(data)
    most = str((8192 + _CODED_MARGIN) * (4352 + _CODED_MARGIN))
    limits = {
        "format_whitelist": kind,
        "codec_whitelist": ",".join((*VIDEO_CODECS, *_AUDIO_CODECS)),
        "max_pixels": most,
    }
    limits |= {"protocol_whitelist": "none", "max_streams": str(_MAX_STREAMS)}
    try:
        with av.open(
            io.BytesIO(data), format=kind, options=limits, io_open=_refuse_file
        ) as container:
            _check_stream(container, len(data))
            container.streams.video[0].codec_context.options = {"max_pixels": most}
            yield container
    except av.error.FFmpegError as error:
        raise MediaError("broken video", error.strerror or str(error)) from error


def container_of(data: bytes) -> str:
    """FFmpeg's name of the container that a file begins like; raises MediaError for any other."""
    kind = next((name for name, beginning in CONTAINERS.items() if beginning.match(data)), None)
    if kind is None:
        raise MediaError(
            "no video that is known", f"it begins like none of {', '.join(CONTAINERS)}"
        )
    return kind


def packets_of(container: Any) -> Iterator[Any]:
    """The packets of the first video stream that hold something; raises MediaError for more than MAX_FRAMES."""
    count = 0
    for packet in container.demux(container.streams.video[0]):
        count += packet.size > 0
        if count > MAX_FRAMES:
            raise MediaError("video too long", f"more than {MAX_FRAMES} frames")
        if packet.size:
            yield packet


def check_work(frames: int, width: int, height: int, size: int) -> None:
    """Raise MediaError for a video whose frames would take long to decode for its `size` in bytes."""
    if (work := frames * width * height) > max(UNCHECKED_WORK, size * WORK_PER_BYTE):
        raise MediaError(
            "video too long",
            f"{frames} frames of {width}x{height} in {size} bytes: {work:.3g} pixels to decode",
        )


def _check_stream(container: Any, size: int) -> None:
    if not container.streams.video:
        raise MediaError("no video that is known", "it holds no video stream")
    stream = container.streams.video[0]
    name = stream.codec_context.codec.name if stream.codec_context is not None else "unknown"
    if name not in VIDEO_CODECS:
        raise MediaError("no video that is known", f"codec {name} is not read")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > FRAME_PIXELS:
        raise MediaError("video too large", f"{width}x{height} pixels, at most {FRAME_PIXELS}")
    if stream.frames > MAX_FRAMES:
        raise MediaError("video too long", f"{stream.frames} frames, at most {MAX_FRAMES}")


def _refuse_file(url: str, flags: int, options: object) -> Any:
    raise PermissionError(f"a video may not open other files: {url[:200]}")


_TABLES: Final = re.compile(rb"stsz|stz2|stts|ctts|trun|elst|cmov")
_EDITS: Final = 1024


def _check_tables(data: bytes) -> None:
    """Raise MediaError for an MP4 whose tables count more frames than it has bytes: FFmpeg makes an entry of 40 bytes of each.

    The tables are found wherever they stand outside of the media themselves, since FFmpeg finds them in odd places too.
    """
    counts = dict.fromkeys((b"samples", b"stts", b"ctts", b"elst"), 0)
    for start, end in _without_media(data):
        for found in _TABLES.finditer(data, start, end):
            place, kind = found.start(), found[0]
            size = int.from_bytes(data[place - 4 : place])
            if size > 1 and not 12 <= size <= end - place + 4:
                continue  # no box, but the letters by chance
            if kind == b"cmov":
                raise MediaError(
                    "no video that is known",
                    "a QuickTime file with a compressed header: write it anew with ffmpeg",
                )
            box = memoryview(data)[place + 8 * (size == 1) : place + size if size > 1 else end]
            counts[kind if kind in counts else b"samples"] += _counted(box, kind)
    most, edits = len(data) + 1024, counts[b"elst"]
    if (worst := max(counts[kind] for kind in (b"samples", b"stts", b"ctts"))) > most:
        raise MediaError("broken video", f"its tables count {worst} frames in {len(data)} bytes")
    if edits > _EDITS or edits * counts[b"samples"] > (1 << 22) + len(data):
        raise MediaError("broken video", f"{edits} edits of {counts[b'samples']} frames")


def _without_media(data: bytes) -> Iterator[tuple[int, int]]:
    """The stretches of an MP4 between its boxes of media (mdat)."""
    start = place = 0
    while place + 8 <= len(data):
        size, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        size = (
            int.from_bytes(data[place + 8 : place + 16]) if size == 1 else size or len(data) - place
        )
        if size < 8 or place + size > len(data):
            break
        if kind == b"mdat":
            yield start, place
            start = place + size
        place += size
    yield start, len(data)


def _counted(box: memoryview, kind: bytes) -> int:
    """What a table counts; its version and flags are at byte 4 of `box`."""
    if kind in (b"stsz", b"stz2"):
        return int.from_bytes(box[12:16])
    first = int.from_bytes(box[8:12])
    if kind in (b"trun", b"elst"):
        return first
    rows = np.frombuffer(box[12 : 12 + 8 * first][: (len(box) - 12) // 8 * 8], ">u4")
    return int(rows[::2].sum(dtype=np.uint64))
