"""Wanted frames out of a video file, found by the time at which they are shown; the others are decoded only if needed."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visionloom.data.image import Pixels, check_size
from visionloom.data.sample import SampleError, Video
from visionloom.parallel.errors import UserError

TOLERANCE: Final = 0.51
"""How far a frame may be from the time that the sample gives for it, in frames at the video's mean rate."""
_CODED_MARGIN: Final = 128
"""Pixels by which coded sides may exceed the shown ones: blocks of 64 or 128 are always coded whole."""
DRIFT: Final = 0.01
"""How much longer or shorter than the sample says a video may be: rates are often rounded (29.97 for 30000/1001)."""


def decode_frames(
    data: bytes, video: Video, frames: NDArray[np.int64], times: Sequence[float], sample_id: str
) -> Iterator[Pixels]:
    """The frames (ascending indices, shown at `times` seconds) as pixels uint8 [height, width, 3], one after the other.

    The same pixels as if every frame were decoded. Raises SampleError naming the member if it cannot be decoded, has
    another size or number of frames than the sample says, or shows no frame at a wanted time; UserError without PyAV.
    """
    assert video.ref is not None, "extracted frames are pictures"
    try:
        import av
    except ImportError:
        raise UserError("video files need PyAV: pip install 'visionloom[video]'") from None
    try:
        with av.open(BytesIO(data)) as container:
            yield from _decode(container, video, frames, times, sample_id)
    except av.error.FFmpegError as error:
        raise SampleError(sample_id, video.ref, f"cannot be decoded: {error.strerror or error}") from error


def _decode(
    container: Any, video: Video, frames: NDArray[np.int64], times: Sequence[float], sample_id: str
) -> Iterator[Pixels]:
    name = video.ref or ""
    if not container.streams.video:
        raise SampleError(sample_id, name, "holds no video stream")
    stream = container.streams.video[0]
    size = (video.height, video.width)
    check_size((stream.codec_context.height, stream.codec_context.width), size, sample_id, name)
    stream.codec_context.thread_count = 1  # the loader's workers are the parallelism; and frames come out without delay
    # Whatever size a later packet claims, no more is allocated than for the frames that were announced.
    most = (video.height + _CODED_MARGIN) * (video.width + _CODED_MARGIN)
    stream.codec_context.options = {"max_pixels": str(most)}
    packets = [packet for packet in container.demux(stream) if packet.size]
    if any(packet.pts is None for packet in packets):
        raise SampleError(sample_id, name, "does not say when its frames are shown: convert it to MP4 or Matroska")
    shown = sorted(packet.pts for packet in packets if not packet.is_discard)
    if len(shown) != video.file_frames:
        raise SampleError(sample_id, name, f"{len(shown)} frames, the sample says {video.file_frames}")
    wanted = _stamps(shown, float(stream.time_base), video, frames, times, sample_id)
    waiting, picture = deque(wanted), _Converter()
    for frame in _shown_frames(stream.codec_context, packets, set(wanted)):
        seconds = (frame.pts - shown[0]) * float(stream.time_base)
        if not waiting or frame.pts != waiting.popleft():
            raise SampleError(sample_id, name, f"frames before the one at {seconds:g} s cannot be decoded")
        if frame.is_corrupt:
            raise SampleError(sample_id, name, f"the frame at {seconds:g} s is damaged")
        check_size((frame.height, frame.width), size, sample_id, name)
        yield picture.rgb(frame)
    if waiting:
        raise SampleError(sample_id, name, f"the last {len(waiting)} of its wanted frames cannot be decoded")


def _stamps(
    shown: list[int], base: float, video: Video, frames: NDArray[np.int64], times: Sequence[float], sample_id: str
) -> list[int]:
    """Presentation times, in the stream's own unit, of the wanted frames: the nearest to what the sample says."""
    found: list[int] = []
    slack = TOLERANCE / video.fps
    lasts = (shown[-1] - shown[0]) * base
    said = video.times[-1] - video.times[0] if video.times else (video.file_frames - 1) / video.fps
    if abs(lasts - said) > max(2 * slack, DRIFT * said):
        raise SampleError(sample_id, video.ref or "", f"{lasts:g} s from first to last frame, the sample says {said:g}")
    for index, seconds in zip(frames.tolist(), times, strict=True):
        stamp = _nearest(shown, shown[0] + seconds / base)
        if abs((stamp - shown[0]) * base - seconds) > slack or (found and stamp <= found[-1]):
            raise SampleError(sample_id, video.ref or "", f"shows no frame {index} at {seconds:g} s: its times are others")
        found.append(stamp)
    return found


def _nearest(ascending: list[int], value: float) -> int:
    place = bisect_left(ascending, value)
    around = ascending[max(place - 1, 0) : place + 1]
    return min(around, key=lambda stamp: abs(stamp - value))


class _Converter:
    """Frames to RGB, by one scaler that is set up once."""

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()

    def rgb(self, frame: Any) -> Pixels:
        plane = self._reformatter.reformat(frame, format="rgb24", threads=1).planes[0]
        lines = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        return lines[:, : 3 * plane.width].reshape(plane.height, plane.width, 3)


# ---- decoding no more than needed


@dataclass(slots=True)
class _Group:
    """Packets from one keyframe up to the next, in the order of decoding."""

    packets: list[Any]
    wanted: int = 0
    """Packets up to and including the last wanted one."""
    leading: bool = False
    """Whether frames shown before the keyframe, which may lean on the group before, are wanted."""


def _shown_frames(context: Any, packets: list[Any], wanted: set[int]) -> Iterator[Any]:
    """The wanted frames in the order in which they are shown.

    Unwanted packets that no other leans on are skipped (`skip_frame=NONREF`), and so is the end of a group of pictures
    behind its last wanted packet, and a group without any.
    """
    groups = _groups(packets, wanted)
    stops = [len(group.packets) if after.leading else group.wanted for group, after in pairwise([*groups, _Group([])])]
    for group, stop, following in zip(groups, stops, [*stops[1:], 0], strict=True):
        for packet in group.packets[:stop]:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from _only(context.decode(packet), wanted)
        if stop and (stop < len(group.packets) or not following):
            yield from _only(context.decode(None), wanted)  # what the decoder still holds
            context.flush_buffers()  # so that it starts anew at a keyframe


def _groups(packets: list[Any], wanted: set[int]) -> list[_Group]:
    groups: list[_Group] = []
    for packet in packets:
        if packet.is_keyframe or not groups:
            groups.append(_Group([]))
        group = groups[-1]
        group.packets.append(packet)
        if packet.pts in wanted:
            group.wanted = len(group.packets)
            group.leading = group.leading or packet.pts < group.packets[0].pts
    return groups


def _only(frames: list[Any], wanted: set[int]) -> Iterator[Any]:
    return (frame for frame in frames if frame.pts in wanted)
