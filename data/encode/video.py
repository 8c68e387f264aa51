"""Wanted frames out of a video file, found by the time at which they are shown; the others are decoded only if needed."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visionloom.data.encode.image import Pixels, check_size
from visionloom.data.shards.open_media import MediaError, check_work, open_video, packets_of
from visionloom.data.shards.sample import SampleError, Video

TOLERANCE: Final = 0.51
"""How far a frame may be from the time that the sample gives for it, in frames at the video's mean rate."""
_CODED_MARGIN: Final = 256
"""Pixels by which coded sides may exceed the shown ones: blocks of 64 or 128 are always coded whole, and the decoder of MPEG-4
part 2 counts the edges that it keeps around a frame (more than 128 pixels)."""
DRIFT: Final = 0.01
"""How much longer or shorter than the sample says a video may be: rates are often rounded (29.97 for 30000/1001)."""


def decode_frames(
    data: bytes,
    video: Video,
    frames: NDArray[np.int64],
    times: Sequence[float],
    sample_id: str,
) -> Iterator[Pixels]:
    """The frames (ascending indices, shown at `times` seconds) as pixels uint8 [height, width, 3], one after the other.

    The same pixels as if every frame were decoded; no packets and no frames but the present one are held. Raises SampleError
    naming the member if it cannot be decoded, has another size, duration or number of frames than the sample says, or shows
    no frame at a wanted time; UserError without PyAV.
    """
    assert video.ref is not None, "extracted frames are pictures"
    try:
        with open_video(data) as container:
            packets, base = _look_through(container, video, sample_id)
        check_work(len(packets), video.width, video.height, len(data))
        wanted = _stamps(packets, base, video, frames, times, sample_id)
        with open_video(
            data
        ) as container:  # from its start again: seeking is not exact in every container
            yield from _decode(container, video, packets, wanted, base, sample_id)
    except MediaError as error:
        raise SampleError(sample_id, video.ref, f"cannot be decoded: {error.detail}") from error


class _Packet(NamedTuple):
    """What is known of a packet before it is decoded."""

    stamp: int
    is_key: bool
    is_shown: bool


def _look_through(
    container: Any,
    video: Video,
    sample_id: str,
) -> tuple[list[_Packet], float]:
    """Every packet of the video in the order of decoding, and the unit of their stamps in seconds; checks the video's facts."""
    name = video.ref or ""
    stream = container.streams.video[0]
    found = (stream.codec_context.height, stream.codec_context.width)
    check_size(found, (video.height, video.width), sample_id, name)
    packets = [
        _Packet(one.pts, one.is_keyframe, not one.is_discard) for one in packets_of(container)
    ]
    if any(packet.stamp is None for packet in packets):
        raise SampleError(
            sample_id, name, "does not say when its frames are shown: convert it to MP4 or Matroska"
        )
    count = sum(packet.is_shown for packet in packets)
    if count != video.file_frames:
        raise SampleError(sample_id, name, f"{count} frames, the sample says {video.file_frames}")
    return packets, float(stream.time_base)


def _stamps(
    packets: list[_Packet],
    base: float,
    video: Video,
    frames: NDArray[np.int64],
    times: Sequence[float],
    sample_id: str,
) -> list[int]:
    """Stamps of the wanted frames: of those nearest to the times that the sample says."""
    shown = sorted(packet.stamp for packet in packets if packet.is_shown)
    begin, name = video.times[0] if video.times else 0.0, video.ref or ""
    lasts = (shown[-1] - shown[0]) * base
    said = video.times[-1] - begin if video.times else (video.file_frames - 1) / video.fps
    slack = TOLERANCE / video.fps
    if abs(lasts - said) > max(2 * slack, DRIFT * said):
        raise SampleError(
            sample_id, name, f"{lasts:g} s from first to last frame, the sample says {said:g}"
        )
    found: list[int] = []
    for index, seconds in zip(frames.tolist(), times, strict=True):
        stamp = _nearest(shown, shown[0] + (seconds - begin) / base)
        if abs((stamp - shown[0]) * base - (seconds - begin)) > slack or (
            found and stamp <= found[-1]
        ):
            raise SampleError(
                sample_id, name, f"shows no frame {index} at {seconds:g} s: its times are others"
            )
        found.append(stamp)
    return found


def _nearest(ascending: list[int], value: float) -> int:
    place = bisect_left(ascending, value)
    around = ascending[max(place - 1, 0) : place + 1]
    return min(around, key=lambda stamp: abs(stamp - value))


def _decode(
    container: Any,
    video: Video,
    packets: list[_Packet],
    wanted: list[int],
    base: float,
    sample_id: str,
) -> Iterator[Pixels]:
    stream = container.streams.video[0]
    context = stream.codec_context
    context.thread_count = (
        1  # the loader's workers are the parallelism; and frames come out without delay
    )
    # Whatever size a later packet claims, no more is allocated than for the frames that were announced.
    context.options = {
        "max_pixels": str((video.height + _CODED_MARGIN) * (video.width + _CODED_MARGIN))
    }
    waiting, picture, name = deque(wanted), _Converter(), video.ref or ""
    for frame in _wanted_frames(container.demux(stream), context, packets, set(wanted)):
        if not waiting or frame.pts != waiting.popleft():
            raise SampleError(
                sample_id,
                name,
                f"frames before the one at {frame.pts * base:g} s cannot be decoded",
            )
        if frame.is_corrupt:
            raise SampleError(sample_id, name, f"the frame at {frame.pts * base:g} s is damaged")
        check_size((frame.height, frame.width), (video.height, video.width), sample_id, name)
        yield picture.rgb(frame)
    if waiting:
        raise SampleError(
            sample_id, name, f"the last {len(waiting)} of its wanted frames cannot be decoded"
        )


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

    key: int
    """Stamp of the keyframe."""
    size: int = 0
    wanted: int = 0
    """Packets up to and including the last wanted one."""
    leading: bool = False
    """Whether frames shown before the keyframe, which may lean on the group before, are wanted."""


def _wanted_frames(
    demuxed: Iterator[Any], context: Any, packets: list[_Packet], wanted: set[int]
) -> Iterator[Any]:
    """The wanted frames in the order in which they are shown.

    Unwanted packets that no other leans on are skipped (`skip_frame=NONREF`), and so is the end of a group of pictures
    behind its last wanted packet, and a group without any.
    """
    present = (packet for packet in demuxed if packet.size)
    groups = _groups(packets, wanted)
    stops = [
        group.size if after.leading else group.wanted
        for group, after in pairwise([*groups, _Group(0)])
    ]
    while stops and not stops[-1]:  # the file is not read on behind the last wanted frame
        stops.pop()
    for group, stop, following in zip(groups, stops, [*stops[1:], 0], strict=False):
        for place, packet in enumerate(islice(present, group.size)):
            if place < stop:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                yield from _only(context.decode(packet), wanted)
        if stop and (stop < group.size or not following):
            yield from _only(context.decode(None), wanted)  # what the decoder still holds
            context.flush_buffers()  # so that it starts anew at a keyframe


def _groups(packets: list[_Packet], wanted: set[int]) -> list[_Group]:
    groups: list[_Group] = []
    for packet in packets:
        if packet.is_key or not groups:
            groups.append(_Group(packet.stamp))
        group = groups[-1]
        group.size += 1
        if packet.stamp in wanted:
            group.wanted = group.size
            group.leading = group.leading or packet.stamp < group.key
    return groups


def _only(frames: list[Any], wanted: set[int]) -> Iterator[Any]:
    return (frame for frame in frames if frame.pts in wanted)
