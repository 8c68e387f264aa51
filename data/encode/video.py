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
    """Yield the frames (ascending indices, shown at `times` seconds) as pixels uint8 [height, width, 3].

    The same pixels as if every frame were decoded; no packets and no frames but the present one are held.

    Raises:
        SampleError: naming the member, if it cannot be decoded, has another size, duration or number of frames than the
            sample says, or shows no frame at a wanted time.
        UserError: without PyAV.
    """
    assert video.ref is not None, "extracted frames are pictures"
    facts = _SaidFacts(video, sample_id)
    try:
        with open_video(data) as container:
            track = facts.check_track(container)
        check_work(len(track.packets), video.width, video.height, len(data))
        wanted = facts.stamps_of(track, frames, times)
        # from its start again: seeking is not exact in every container
        with open_video(data) as container:
            yield from facts.decode(container, track, wanted)
    except MediaError as error:
        raise facts.error(f"cannot be decoded: {error.detail}") from error


class _Packet(NamedTuple):
    """What is known of a packet before it is decoded."""

    stamp: int
    is_key: bool
    is_shown: bool


@dataclass(frozen=True, slots=True)
class _Track:
    """The packets of a video in the order of decoding, and the unit of their stamps in seconds."""

    packets: list[_Packet]
    base: float

    def shown(self) -> list[int]:
        """Return the stamps of the frames that are shown, ascending."""
        return sorted(packet.stamp for packet in self.packets if packet.is_shown)


@dataclass(frozen=True, slots=True)
class _SaidFacts:
    """The facts that a sample says of a video file, which the file is checked by."""

    video: Video
    sample_id: str

    def error(self, problem: str) -> SampleError:
        """Return the error that names the file."""
        return SampleError(self.sample_id, self.video.ref or "", problem)

    def check_size(self, height: int, width: int) -> None:
        """Refuse frames of another size."""
        said = (self.video.height, self.video.width)
        check_size((height, width), said, self.sample_id, self.video.ref or "")

    def check_track(self, container: Any) -> _Track:
        """Read every packet without decoding one, and check the size and number of frames."""
        stream = container.streams.video[0]
        self.check_size(stream.codec_context.height, stream.codec_context.width)
        packets = []
        for packet in packets_of(container):
            packets.append(_Packet(packet.pts, packet.is_keyframe, not packet.is_discard))
        # as in a raw stream or an old AVI
        if any(packet.stamp is None for packet in packets):
            raise self.error(
                "does not say when its frames are shown: convert it to MP4 or Matroska"
            )
        count = sum(packet.is_shown for packet in packets)
        if count != self.video.file_frames:
            raise self.error(f"{count} frames, the sample says {self.video.file_frames}")
        return _Track(packets, float(stream.time_base))

    def stamps_of(
        self,
        track: _Track,
        frames: NDArray[np.int64],
        times: Sequence[float],
    ) -> list[int]:
        """Return the stamps of the wanted frames: those nearest to their times."""
        shown = track.shown()
        self._check_duration((shown[-1] - shown[0]) * track.base)
        # a file may begin at any stamp, and a sample's times at any second: both count from the first frame
        begin = self.video.times[0] if self.video.times else 0.0
        stamps: list[int] = []
        for index, seconds in zip(frames.tolist(), times, strict=True):
            stamp = self._nearest(shown, seconds - begin, track.base)
            is_twice = stamps and stamp is not None and stamp <= stamps[-1]
            if stamp is None or is_twice:
                raise self.error(f"shows no frame {index} at {seconds:g} s: its times are others")
            stamps.append(stamp)
        return stamps

    def _check_duration(self, seconds: float) -> None:
        """Compare the time from first to last frame with what the sample says."""
        video = self.video
        if video.times:
            said = video.times[-1] - video.times[0]
        else:
            said = (video.file_frames - 1) / video.fps
        slack = TOLERANCE / video.fps
        # each end may be off by the slack
        if abs(seconds - said) > max(2 * slack, DRIFT * said):
            raise self.error(f"{seconds:g} s from first to last frame, the sample says {said:g}")

    def _nearest(self, shown: list[int], since: float, base: float) -> int | None:
        """Return the stamp nearest to a time since the first one, in seconds; None: too far."""
        value = shown[0] + since / base
        place = bisect_left(shown, value)
        # the nearest one is just below or just above
        around = shown[max(place - 1, 0) : place + 1]
        nearest = min(around, key=lambda stamp: abs(stamp - value))
        distance = abs((nearest - shown[0]) * base - since)
        return None if distance > TOLERANCE / self.video.fps else nearest

    def decode(self, container: Any, track: _Track, wanted: list[int]) -> Iterator[Pixels]:
        """Yield the frames of these stamps, in the order in which they are shown."""
        stream = container.streams.video[0]
        context = stream.codec_context
        self._bound(context)
        waiting, picture = deque(wanted), _Converter()
        for frame in _wanted_frames(container.demux(stream), context, track.packets, set(wanted)):
            seconds = frame.pts * track.base
            if not waiting or frame.pts != waiting.popleft():
                raise self.error(f"frames before the one at {seconds:g} s cannot be decoded")
            self._check_frame(frame, seconds)
            yield picture.rgb(frame)
        if waiting:
            raise self.error(f"the last {len(waiting)} of its wanted frames cannot be decoded")

    def _check_frame(self, frame: Any, seconds: float) -> None:
        if frame.is_corrupt:
            raise self.error(f"the frame at {seconds:g} s is damaged")
        self.check_size(frame.height, frame.width)

    def _bound(self, context: Any) -> None:
        """Bound the threads and the memory of a decoder."""
        # the loader's workers are the parallelism; and frames come out without delay
        context.thread_count = 1
        # Whatever size a later packet claims, no more is allocated than for the frames that were announced.
        most = (self.video.height + _CODED_MARGIN) * (self.video.width + _CODED_MARGIN)
        context.options = {"max_pixels": str(most)}


class _Converter:
    """Frames to RGB, by one scaler that is set up once."""

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self._reformatter = VideoReformatter()

    def rgb(self, frame: Any) -> Pixels:
        # one thread: the loader's workers are the parallelism
        plane = self._reformatter.reformat(frame, format="rgb24", threads=1).planes[0]
        lines = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        # lines are padded to a multiple of the processor's vectors
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
    """Yield the wanted frames in the order in which they are shown.

    Unwanted packets that no other leans on are skipped (`skip_frame=NONREF`), and so is the end of a group of pictures
    after its last wanted packet, and a group without any.
    """
    present = (packet for packet in demuxed if packet.size)
    groups = _groups(packets, wanted)
    stops = _stops(groups)
    for group, stop, following in zip(groups, stops, [*stops[1:], 0], strict=False):
        for place, packet in enumerate(islice(present, group.size)):
            if place < stop:
                context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                yield from _only(context.decode(packet), wanted)
        if stop and (stop < group.size or not following):
            yield from _only(context.decode(None), wanted)  # what the decoder still holds
            context.flush_buffers()  # so that it starts anew at a keyframe


def _groups(packets: list[_Packet], wanted: set[int]) -> list[_Group]:
    """Divide packets into groups that begin with a keyframe."""
    groups: list[_Group] = []
    for packet in packets:
        if packet.is_key or not groups:
            groups.append(_Group(packet.stamp))
        group = groups[-1]
        group.size += 1
        if packet.stamp in wanted:
            group.wanted = group.size
            # shown before its own keyframe, so it leans on the group before
            group.leading = group.leading or packet.stamp < group.key
    return groups


def _stops(groups: list[_Group]) -> list[int]:
    """Count the packets of each group that are decoded, up to the last group with any."""
    # frames shown before a keyframe need the whole group before it
    stops = []
    for group, after in pairwise([*groups, _Group(0)]):
        stops.append(group.size if after.leading else group.wanted)
    # the file is not read on after the last wanted frame
    while stops and not stops[-1]:
        stops.pop()
    return stops


def _only(frames: list[Any], wanted: set[int]) -> Iterator[Any]:
    return (frame for frame in frames if frame.pts in wanted)
