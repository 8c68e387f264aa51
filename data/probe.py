"""What the header of a media member says: sizes, and a video's frames, rate and duration. Nothing is decoded.

Pictures are opened by Pillow, videos by PyAV, which is optional: without it a video's numbers are 0.
"""

import warnings
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO, Final, Literal

Kind = Literal["image", "video", "other"]
KINDS: Final[tuple[Kind, ...]] = ("other", "image", "video")
"""In the order of their codes in the index."""
FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's names of the picture formats that are read."""
_PICTURES: Final = frozenset(["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"])
_VIDEOS: Final = frozenset(["mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "flv", "wmv"])


@dataclass(frozen=True, slots=True)
class MediaFacts:
    """A picture (frames 1) or a video: sizes in pixels as stored, fps the mean in frames per second, duration in seconds."""

    kind: Kind
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0
    duration: float = 0.0


def kind_of(name: str) -> Kind:
    """What a member is by the ending of its name."""
    ending = name.rpartition(".")[2].lower()
    return "image" if ending in _PICTURES else "video" if ending in _VIDEOS else "other"


def probe(name: str, data: bytes | BinaryIO) -> MediaFacts:
    """Header facts of a media member, its kind by the ending of its name; other kinds have no numbers.

    A video whose container does not count its frames has its packets counted, undecoded. Raises ValueError with a clear
    sentence if the header cannot be read.
    """
    kind = kind_of(name)
    file = BytesIO(data) if isinstance(data, bytes) else data
    if kind == "image":
        return _picture(name, file)
    return _video(name, file) if kind == "video" else MediaFacts(kind)


def _picture(name: str, file: BinaryIO) -> MediaFacts:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            width, height = Image.open(file, formats=FORMATS).size
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no picture that can be read: the header of {' or '.join(FORMATS)} expected") from None
    except Exception as error:  # Pillow raises whatever damaged bytes lead it to
        raise ValueError(f"the header of {name} cannot be read: {error}") from None
    return MediaFacts("image", width, height, frames=1)


def _video(name: str, file: BinaryIO) -> MediaFacts:
    try:
        import av
    except ImportError:  # the optional extra `video`
        return MediaFacts("video")
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise ValueError(f"{name} holds no video stream")
            return _stream(container, container.streams.video[0])
    except av.error.FFmpegError as error:
        raise ValueError(f"{name} is no video that can be read: {error}") from None


def _stream(container: Any, stream: Any) -> MediaFacts:
    frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    duration = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    if not duration and fps:
        duration = frames / fps
    return MediaFacts("video", stream.codec_context.width, stream.codec_context.height, frames, fps, duration)
