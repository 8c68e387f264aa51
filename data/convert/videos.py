"""Videos of a source: a file, a folder of extracted frames with their times, or a list of frames."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from visionloom.common.jsonfile import JsonError, load_json
from visionloom.data.convert.files import MediaFiles, named, reference
from visionloom.data.convert.keys import Keys, RecordFields, number
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft
from visionloom.data.shards.media_header import kind_of
from visionloom.data.shards.sample import Video

LARGEST_TIMES: Final = 64 << 20
"""Bytes of a times.json."""
TIMES: Final = "times.json"
"""In a folder of frames: a list of seconds, one for each frame in sorted order, or {"frame.jpg": seconds}."""
NARROWING: Final = {
    "start": "first second shown",
    "end": "last second shown",
    "video_start": "first second shown",
    "video_end": "last second shown",
    "sample_fps": "frames taken a second; of a list of frames without t or fps their rate",
    "max_frames": "most frames",
    "t": "seconds of each frame in a list",
    "fps": "rate of a list of frames",
}
SOURCES: Final = ("video", "video_url", "file", "url", "path", "frames", "files", "base64", "bytes")
_SOURCE: Final = "name of a file or folder of frames, a list of frames, or the bytes"
VIDEO: Final = Keys(
    "video",
    {
        **dict.fromkeys(SOURCES, _SOURCE),
        **NARROWING,
        "total_pixels": "most frames x height x width",
    },
)
"""An object in place of a video's name."""
VIDEO_PART: Final = Keys(
    "video",
    {
        **VIDEO.read,
        "type": "kind of the part",
        "fps": "frames taken a second (sample_fps); of a list of frames their rate",
        "nframes": "most frames (max_frames)",
        "total_pixels": "half of total_pixels: qwen-vl-utils counts pairs of frames",
    },
)
"""A typed part of a turn, in the words of qwen-vl-utils."""


def add_video(draft: SampleDraft, files: MediaFiles, value: Any, *objects: RecordFields) -> Video:
    """Add the video that `value` means: a name of a file or of a folder of frames, a list of frames, or an object.

    `objects`: what narrows it and has its times, the nearest first: an object (VIDEO), a typed part of a turn (VIDEO_PART), and
    the record, of which only `t` and `fps` of extracted frames count. Times of frames come from `t` (seconds), `fps` (of the
    frames given) or, where nothing else gives their rate, from `sample_fps`, else from times.json in the folder; they are
    never guessed. Raises Skip.
    """
    if isinstance(value, Mapping):
        inner = draft.open(VIDEO, value)
        return add_video(draft, files, named(inner, *SOURCES), inner, *objects)
    if isinstance(value, list):
        return _Frames(objects, value).added(draft, files)

    ref = reference(value)
    # Only a name can be that of a folder.
    if isinstance(ref, str) and not ref.startswith(("data:", "http://", "https://")):
        path = files.locate(ref)
        if path.is_dir():
            return _folder_frames(path, files, objects).added(draft, files)
    return draft.video(files.read(value), **_narrowed(objects, of_file=True))


class _Frames:
    """Names of a video's extracted frames, and their times, in seconds, once they are known."""

    def __init__(self, objects: tuple[RecordFields, ...], names: list[Any]) -> None:
        self.objects, self.names = objects, names
        self.times = self._given_times()
        self.fix = "give t (a list of seconds), fps or sample_fps"

    def _given_times(self) -> list[float] | None:
        """Return the times by `t` or `fps` of the nearest object that has one; None if none does."""
        for fields in self.objects:
            times = fields.take("t")
            if times is not None:
                return _numbers(times, len(self.names))
            rate = fields.number("fps")
            if rate is not None:
                return self._at_rate(rate)
        return None

    def _at_rate(self, rate: float) -> list[float]:
        if rate <= 0:
            raise Skip("frames without times", f"fps {rate:g}")
        return [index / rate for index in range(len(self.names))]

    def added(self, draft: SampleDraft, files: MediaFiles) -> Video:
        """Add the frames to the draft; raises Skip where nothing gives their times."""
        # Before sample_fps is taken for the rate itself.
        part = _narrowed(self.objects, of_file=False, rate_known=self.times is not None)
        times = self._times_at_sample_rate() if self.times is None else self.times
        if times is None:
            raise Skip("frames without times", self.fix)
        return draft.frames([files.read(name) for name in self.names], times, **part)

    def _times_at_sample_rate(self) -> list[float] | None:
        """Return the times where only `sample_fps` gives their rate, as qwen-vl-utils has it for lists of frames."""
        for fields in self.objects:
            if fields.keys.kind == VIDEO.kind:
                rate = fields.number("sample_fps")
                if rate is not None:
                    return self._at_rate(rate)
        return None


def _folder_frames(path: Path, files: MediaFiles, objects: tuple[RecordFields, ...]) -> _Frames:
    """Return the frames in a folder: its pictures in sorted order, or those of its times.json."""
    names = sorted(file.name for file in path.iterdir() if kind_of(file.name) == "image")
    frames = _Frames(objects, names)
    frames.fix = "give t (a list of seconds), fps, or times.json in the folder"
    if frames.times is None and (path / TIMES).exists():
        try:
            content = files.read(str(path.absolute() / TIMES), LARGEST_TIMES)
            times = load_json(content, TIMES)
        except JsonError as error:
            raise Skip("broken times.json", f"{path / TIMES}: {error}") from None
        if isinstance(times, dict):
            # By time, and by name where two are the same.
            pairs = sorted((_seconds(seconds), name) for name, seconds in times.items())
            names = [name for _, name in pairs]
            times = [seconds for seconds, _ in pairs]
        frames.times = _numbers(times, len(names))
    # Absolute: relative names are those of the source's own folders.
    frames.names = [str(path.absolute() / name) for name in names]
    return frames


def _numbers(value: Any, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        raise Skip("frames without times", f"{count} frames, times {str(value)[:80]}")
    return [_seconds(item) for item in value]


def _seconds(value: Any) -> float:
    return number(value, "time of a frame")


def _narrowed(
    objects: tuple[RecordFields, ...], of_file: bool, rate_known: bool = True
) -> dict[str, Any]:
    """Return the fields of Video that narrow it: the nearest object's words first.

    `of_file`: it is a video file. `rate_known`: the rate of its frames is given, so that `sample_fps` chooses among them.
    """
    narrowed: dict[str, Any] = {}
    for fields in objects:
        # A record has one rate and one time for all its videos: only frames take them.
        if fields.keys.kind != VIDEO.kind:
            continue
        for name, value in _limits(fields, of_file, rate_known).items():
            if value is not None:
                narrowed.setdefault(name, value)
    return narrowed


def _limits(fields: RecordFields, of_file: bool, rate_known: bool) -> dict[str, Any]:
    """Read the limits of one object; a typed part has the words of qwen-vl-utils."""
    is_part = fields.keys is VIDEO_PART
    rates = ("sample_fps", "fps") if of_file and is_part else ("sample_fps",)
    counts = ("max_frames", "nframes") if is_part else ("max_frames",)
    pixels = fields.whole("total_pixels")
    if pixels is not None and is_part:
        # qwen-vl-utils counts pairs of frames.
        pixels *= 2
    return {
        "start": fields.number("start", "video_start"),
        "end": fields.number("end", "video_end"),
        "sample_fps": fields.number(*rates) if rate_known else None,
        "max_frames": fields.whole(*counts),
        "total_pixels": pixels,
    }
