"""Pictures and videos that strangers made, opened within limits: the only place that calls Pillow's and PyAV's open.

The first bytes of a file decide its format, never its name and never a guess: other formats that the libraries know are not
tried, so that a playlist cannot make FFmpeg play a file of this machine. A video that asks for another file, by whatever means its
container has, is refused. The cost of a small file is bounded by the claims of its header, before anything is decoded.
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
_MPEG: Final = ("mpeg1video", "mpeg2video", "mpegvideo", "mpeg4", "h261", "h263", "h263i", "h263p")
_NEWER: Final = ("h264", "hevc", "vvc", "av1", "libdav1d", "libaom-av1")
_GOOGLE: Final = ("vp8", "vp9", "libvpx", "libvpx-vp9", "vp6", "vp6a", "vp6f", "theora", "flv")
_MICROSOFT: Final = ("msmpeg4v1", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "wmv3", "vc1")
_EDITING: Final = ("mjpeg", "png", "rawvideo", "dvvideo", "prores", "dnxhd", "cfhd")
_LOSSLESS: Final = ("ffv1", "huffyuv", "ffvhuff", "utvideo", "magicyuv", "qtrle", "rpza")
_OLD: Final = ("svq1", "svq3", "cinepak", "indeo3", "indeo4", "indeo5")
VIDEO_CODECS: Final = (
    *(*_NEWER, *_GOOGLE, *_MPEG, *_MICROSOFT),
    *(*_EDITING, *_LOSSLESS, *_OLD),
)
"""FFmpeg's decoders that are used; others know formats in which nobody keeps videos, text screens among them."""
_SPEECH: Final = ("amrnb", "amrwb", "adpcm_ms", "adpcm_ima_wav")
_SOUND: Final = ("aac", "aac_latm", "ac3", "eac3", "mp2", "mp2float", "mp3", "mp3float")
_OPEN_SOUND: Final = ("opus", "vorbis", "flac", "alac", "wmav1", "wmav2")
_PCM: Final = ("pcm_s16le", "pcm_s16be", "pcm_u8", "pcm_s24le")
_AUDIO_CODECS: Final = (*_SOUND, *_OPEN_SOUND, *_SPEECH, *_PCM)
"""Sound is not read, but without its decoder FFmpeg looks through megabytes for what a stream of it is."""
MAX_PIXELS: Final = 1 << 27
"""Larger pictures (134 million pixels, 400 MB decoded) are refused from their header."""
UNCHECKED_PIXELS: Final = 1 << 25
"""Pictures up to this size may be compressed to any number of bytes: decoded and laid on white, one takes 0.8 GB at most."""
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
"""How TIFF begins: byte order, the place of the first directory's offset, and the bytes of a count, an entry and an offset."""
_TIFF_TYPES: Final = {
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 9, 11, 13), 4),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), 8),
}
"""Bytes of a value of each type; of those that are not here one."""
_POINTERS: Final = (330, 34665, 34853, 40965)
"""Tags whose value is the place of another directory, those that Pillow follows."""
_DIRECTORIES: Final = 64
_LARGEST_VALUES: Final = 1 << 16
"""Bytes: small files may say more of themselves than they hold."""
_MAX_STREAMS: Final = 64
_TABLES: Final = re.compile(rb"stsz|stz2|stts|ctts|trun|elst|cmov")
"""Boxes of an MP4 that count frames, and the one that holds others compressed."""
_EDITS: Final = 1024
_CODED_MARGIN: Final = 512
"""Pixels by which the sides that are coded may exceed those that are shown."""


class MediaError(ValueError):
    """A picture or video that is not opened or decoded: `reason` in a few words, `detail` with the numbers."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


# ---- pictures


def open_picture(data: bytes) -> "Pillow.Image":
    """Open a picture: read its header and decode nothing. Of several in a file it is the first; the others are ignored.

    Raises MediaError for another format, a damaged header, and for more pixels or scans than its bytes can be true of.
    """
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    _check_before(data)
    try:
        # Warnings of too many pixels, which are counted below, and of odd metadata.
        with warnings.catch_warnings(action="ignore"):
            picture = Pillow.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        detail = f"it is none of {', '.join(FORMATS)}"
        raise MediaError("no picture that is known", detail) from None
    except Pillow.DecompressionBombError as error:
        raise MediaError("picture too large", str(error)) from None
    except Exception as error:
        # Decoders raise any error that damaged bytes lead them to.
        raise MediaError("broken picture", f"{type(error).__name__}: {error}") from error

    # From the header alone: nothing is decoded, so that a bomb costs nothing.
    check_pixels(picture.width, picture.height, len(data))
    _check_tiles(picture)
    exif = picture.info.get("exif")
    if isinstance(exif, bytes):
        _check_directories(exif.removeprefix(b"Exif\0\0"))
    return picture


def check_pixels(width: int, height: int, size: int) -> None:
    """Raise MediaError for a picture of `size` bytes that has too many pixels, at all or for its bytes."""
    pixels = width * height
    problem = f"{width}x{height} pixels are too many"
    if pixels > MAX_PIXELS:
        raise MediaError("picture too large", f"{problem}: at most {MAX_PIXELS}")
    if pixels > max(UNCHECKED_PIXELS, size * PIXELS_PER_BYTE):
        limit = f"above {UNCHECKED_PIXELS} at most {PIXELS_PER_BYTE} a byte"
        raise MediaError("picture too large", f"{problem} for {size} bytes: {limit}")


def check_scans(data: bytes, width: int, height: int) -> None:
    """Raise MediaError for a JPEG whose scans would take long to decode, as each goes over the whole picture."""
    scans = data.count(b"\xff\xda")
    if scans > _SCANS and scans * width * height > UNCHECKED_WORK:
        raise MediaError("picture too large", f"{scans} scans of {width}x{height} pixels")


def _check_before(data: bytes) -> None:
    """Raise MediaError for what Pillow does not bound while it reads a header."""
    if data[:2] == b"\xff\xd8":
        check_scans(data, *_jpeg_size(data))
    if data[:4] in _TIFF:
        _check_directories(data)
    # WebP allocates both of its canvases when it is opened.
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        check_pixels(width, height, len(data))
    if data[:4] == b"GIF8":
        comments = _before_first_picture(data)
        if comments > _COMMENTS:
            detail = f"{comments} bytes of comments, at most {_COMMENTS}"
            raise MediaError("broken picture", detail)


def _check_directories(data: bytes) -> None:
    """Raise MediaError for directories of a TIFF, or of EXIF, whose values together are larger than the file.

    Pillow copies the value of each tag; tens of thousands of tags may name the same megabyte.
    """
    if data[:4] not in _TIFF:
        return
    order, head, _, _, offset_size = _TIFF[data[:4]]
    waiting = [int.from_bytes(data[head : head + offset_size], order)]
    seen, total = set[int](), 0
    # A directory may point to itself, or to one that points back.
    while waiting and len(seen) < _DIRECTORIES:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        values, pointers = _directory(data, place)
        total += values
        waiting += pointers
        if total > 2 * len(data) + _LARGEST_VALUES:
            raise MediaError("broken picture", f"tags of {total} bytes in {len(data)}")


def _directory(data: bytes, place: int) -> tuple[int, list[int]]:
    """Return the bytes of all values of a TIFF's directory at `place`, and the places of those that it points to."""
    order, _, count_size, entry_size, offset_size = _TIFF[data[:4]]
    start = place + count_size
    entries = int.from_bytes(data[place:start], order)
    end = min(start + entries * entry_size, len(data))

    total, pointers = 0, list[int]()
    for at in range(start, end, entry_size):
        # An entry holds a tag, a type, a number of values, and the values or their place.
        tag = int.from_bytes(data[at : at + 2], order)
        kind = int.from_bytes(data[at + 2 : at + 4], order)
        value = at + 4 + offset_size
        number = int.from_bytes(data[at + 4 : value], order)
        total += number * _TIFF_TYPES.get(kind, 1)
        if tag in _POINTERS:
            pointers.append(int.from_bytes(data[value : value + offset_size], order))
    return total, pointers


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Return width and height by the largest frame header in a JPEG.

    Bytes that look like one by chance only make the limit tighter.
    """
    frame_header = rb"\xff[\xc0\xc1\xc2\xc9\xca]..\x08(..)(..)"
    largest = (0, 0)
    for header in re.finditer(frame_header, data[: 1 << 20], re.DOTALL):
        height, width = int.from_bytes(header[1]), int.from_bytes(header[2])
        if width * height > largest[0] * largest[1]:
            largest = (width, height)
    return largest


def _before_first_picture(data: bytes) -> int:
    """Return the bytes of a GIF's extensions before its first picture."""
    # 13 bytes of header, and a table of 2^n colours of 3 bytes where the flag of one is set.
    has_colours = len(data) > 10 and data[10] & 0x80
    start = 13 + (3 << (data[10] & 7) + 1 if has_colours else 0)
    place = start
    while data[place : place + 1] == b"!":
        place += 2
        # Blocks of at most 255 bytes, each after its length; one of length 0 ends them.
        while place < len(data) and data[place]:
            place += data[place] + 1
        place += 1
    return place - start


def _check_tiles(picture: "Pillow.Image") -> None:
    """Raise MediaError for tiles of a TIFF that are much larger than the picture: a buffer of their size is filled."""
    tags = getattr(picture, "tag_v2", {})
    # TileWidth and TileLength.
    values = [tags.get(number) for number in (322, 323)]
    sides = [side for side in values if isinstance(side, int)]
    if any(side > max(picture.size) + 4096 for side in sides):
        size = f"{picture.width}x{picture.height}"
        raise MediaError("broken picture", f"tiles of {sides} pixels in a picture of {size}")


# ---- videos


@contextmanager
def open_video(data: bytes) -> Iterator[Any]:
    """Open a video file as PyAV's container, with at least one video stream in it and its decoder within limits.

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
        "protocol_whitelist": "none",
        "max_pixels": most,
        "max_streams": str(_MAX_STREAMS),
    }
    file = io.BytesIO(data)
    try:
        with av.open(file, format=kind, options=limits, io_open=_refuse_file) as container:
            _check_stream(container)
            # A decoder has options of its own.
            container.streams.video[0].codec_context.options = {"max_pixels": most}
            yield container
    except av.error.FFmpegError as error:
        raise MediaError("broken video", error.strerror or str(error)) from error


def container_of(data: bytes) -> str:
    """Return FFmpeg's name of the container that a file begins like; raises MediaError for any other."""
    for name, beginning in CONTAINERS.items():
        if beginning.match(data):
            return name
    detail = f"it begins like none of {', '.join(CONTAINERS)}"
    raise MediaError("no video that is known", detail)


def packets_of(container: Any) -> Iterator[Any]:
    """Yield the packets of the first video stream that hold something; raises MediaError for more than MAX_FRAMES."""
    count = 0
    for packet in container.demux(container.streams.video[0]):
        count += packet.size > 0
        if count > MAX_FRAMES:
            raise MediaError("video too long", f"more than {MAX_FRAMES} frames")
        if packet.size:
            yield packet


def check_work(frames: int, width: int, height: int, size: int) -> None:
    """Raise MediaError for a video whose frames would take long to decode for its `size` in bytes."""
    work = frames * width * height
    if work > max(UNCHECKED_WORK, size * WORK_PER_BYTE):
        video = f"{frames} frames of {width}x{height} in {size} bytes"
        raise MediaError("video too long", f"{video}: {work:.3g} pixels to decode")


def _check_stream(container: Any) -> None:
    """Raise MediaError unless the first video stream is of a known codec and within limits."""
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


def _check_tables(data: bytes) -> None:
    """Raise MediaError for an MP4 whose tables count more frames than it has bytes: FFmpeg makes an entry of 40 bytes of each."""
    # stsz, stz2 and trun all count samples; the others rows of their own.
    counts = dict.fromkeys((b"samples", b"stts", b"ctts", b"elst"), 0)
    for kind, box in _tables(data):
        if kind == b"cmov":
            detail = "a QuickTime file with a compressed header: write it anew with ffmpeg"
            raise MediaError("no video that is known", detail)
        counts[kind if kind in counts else b"samples"] += _counted(box, kind)

    samples, edits = counts[b"samples"], counts[b"elst"]
    worst = max(samples, counts[b"stts"], counts[b"ctts"])
    if worst > len(data) + 1024:
        raise MediaError("broken video", f"its tables count {worst} frames in {len(data)} bytes")
    # FFmpeg goes through all frames for each edit.
    if edits > _EDITS or edits * samples > (1 << 22) + len(data):
        raise MediaError("broken video", f"{edits} edits of {samples} frames")


def _tables(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield kind and bytes of each table of an MP4.

    They are searched for everywhere outside of the media themselves, since FFmpeg accepts them in odd places too.
    """
    for start, end in _without_media(data):
        for match in _TABLES.finditer(data, start, end):
            place, kind = match.start(), match[0]
            size = int.from_bytes(data[place - 4 : place])
            if size > 1 and not 12 <= size <= end - place + 4:
                # No box, but the letters by chance.
                continue
            # A size of 1 stands for one of 8 bytes after the kind; 0 for all that is left.
            first = place + 8 if size == 1 else place
            last = place + size if size > 1 else end
            yield kind, memoryview(data)[first:last]


def _without_media(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of each stretch of an MP4 between its boxes of media (mdat)."""
    start = place = 0
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4])
        kind = data[place + 4 : place + 8]
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16])
        elif not size:
            size = len(data) - place
        # A box that leads outside is none: the rest counts as one stretch.
        if size < 8 or place + size > len(data):
            break
        if kind == b"mdat":
            yield start, place
            start = place + size
        place += size
    yield start, len(data)


def _counted(box: memoryview, kind: bytes) -> int:
    """Return the number that a table counts; its version and flags are at byte 4 of `box`."""
    if kind in (b"stsz", b"stz2"):
        return int.from_bytes(box[12:16])
    first = int.from_bytes(box[8:12])
    if kind in (b"trun", b"elst"):
        return first
    # stts and ctts: rows of a count and a duration, u32 each; no more than the box has.
    rows = min(first, (len(box) - 12) // 8)
    numbers = np.frombuffer(box[12 : 12 + 8 * rows], ">u4")
    return int(numbers[::2].sum(dtype=np.uint64))
