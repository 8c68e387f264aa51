"""Facts from the header of a media member: sizes, and a video's frames, rate and duration. Nothing is decoded.

Pictures are opened by Pillow, videos by PyAV, which is optional: without it a video's numbers are 0.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, Literal

from visionloom.data.shards.open_media import MediaError, open_picture, open_video, packets_of

MediaKind = Literal["image", "video", "other"]
KINDS: Final[tuple[MediaKind, ...]] = ("other", "image", "video")
"""In the order of their codes in the index."""
_PICTURES: Final = frozenset(["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff"])
_VIDEOS: Final = frozenset(
    ["mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "flv", "wmv"]
)


@dataclass(frozen=True, slots=True)
class MediaFacts:
    """A picture (frames 1) or a video: sizes in pixels as stored, fps the mean in frames per second, duration in seconds."""

    kind: MediaKind
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0
    duration: float = 0.0


def kind_of(name: str) -> MediaKind:
    """Return a member's kind by the ending of its name."""
    ending = name.rpartition(".")[2].lower()
    if ending in _PICTURES:
        return "image"
    return "video" if ending in _VIDEOS else "other"


def probe(name: str, data: bytes) -> MediaFacts:
    """Read the header facts of a media member, its kind by the ending of its name; other kinds have no numbers.

    A video whose container does not count its frames has its packets counted, undecoded. Raises ValueError with a clear
    sentence if the header cannot be read.
    """
    kind = kind_of(name)
    try:
        if kind == "image":
            picture = open_picture(data)
            return MediaFacts("image", picture.width, picture.height, frames=1)
        # PyAV is the optional extra `video`.
        if kind == "video" and find_spec("av"):
            with open_video(data) as container:
                return _video_facts(container)
    except MediaError as error:
        expected = "picture" if kind == "image" else "video"
        raise ValueError(f"{name} is no {expected} that can be read: {error.detail}") from None
    return MediaFacts(kind)


def _video_facts(container: Any) -> MediaFacts:
    """Read the facts of the first video stream of a container of PyAV's."""
    stream = container.streams.video[0]
    frames = stream.frames or sum(1 for _ in packets_of(container))
    # Some containers have only a guess of FFmpeg's, and some none.
    fps = float(stream.average_rate or stream.guessed_rate or 0)

    if stream.duration:
        duration = float(stream.duration * stream.time_base)
    else:
        # The container's own is in microseconds.
        duration = (container.duration or 0) / 1e6
    if not duration and fps:
        duration = frames / fps
    size = (stream.codec_context.width, stream.codec_context.height)
    return MediaFacts("video", *size, frames, fps, duration)
