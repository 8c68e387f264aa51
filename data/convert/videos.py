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
VIDEO: Final = Keys(
    "video",
    {
        **dict.fromkeys(
            SOURCES, "name of a file or folder of frames, a list of frames, or the bytes"
        ),
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


def add_video(draft: SampleDraft, files: MediaFiles, value: Any, *said: RecordFields) -> Video:
    """Add the video that `value` means: a name of a file or of a folder of frames, a list of frames, or an object.

    `said`: what narrows it and has its times, the nearest first: an object (VIDEO), a typed part of a turn (VIDEO_PART), and
    the record, of which only `t` and `fps` of extracted frames count. Times of frames come from `t` (seconds), `fps` (of the
    frames given) or, where nothing else tells their rate, from `sample_fps`, else from times.json in the folder; they are
    never guessed. Raises Skip.
    """
    if isinstance(value, Mapping):
        inner = draft.open(VIDEO, value)
        return add_video(draft, files, named(inner, *SOURCES), inner, *said)
    if isinstance(value, list):
        return _listed_frames(draft, files, value, said)
    ref = reference(value)
    if (
        isinstance(ref, str)
        and not ref.startswith(("data:", "http://", "https://"))
        and (path := files.locate(ref)).is_dir()
    ):
        return _folder(draft, files, path, said)
    return draft.video(files.read(value), **_part(said, of_file=True))


def _listed_frames(
    draft: SampleDraft, files: MediaFiles, names: list[Any], said: tuple[RecordFields, ...]
) -> Video:
    times = _times(said, len(names))
    narrowed = _part(said, of_file=False, rate_known=times is not None)
    times = _by_sample_rate(said, len(names)) if times is None else times
    if times is None:
        raise Skip("frames without times", "give t (a list of seconds), fps or sample_fps")
    return draft.frames([files.read(name) for name in names], times, **narrowed)


def _folder(
    draft: SampleDraft, files: MediaFiles, path: Path, said: tuple[RecordFields, ...]
) -> Video:
    names = sorted(file.name for file in path.iterdir() if kind_of(file.name) == "image")
    times = _times(said, len(names))
    if times is None and (path / TIMES).exists():
        names, times = _from_file(path / TIMES, names, files)
    narrowed = _part(said, of_file=False, rate_known=times is not None)
    times = _by_sample_rate(said, len(names)) if times is None else times
    if times is None:
        raise Skip(
            "frames without times", "give t (a list of seconds), fps, or times.json in the folder"
        )
    return draft.frames(
        [files.read(str(path.absolute() / name)) for name in names], times, **narrowed
    )


def _from_file(path: Path, names: list[str], files: MediaFiles) -> tuple[list[str], list[float]]:
    """Frames and times by a times.json."""
    try:
        found = load_json(files.read(str(path.absolute()), LARGEST_TIMES), TIMES)
    except JsonError as error:
        raise Skip("broken times.json", f"{path}: {error}") from None
    if isinstance(found, dict):
        names, found = (
            sorted(found, key=lambda name: (_seconds(found[name]), name)),
            sorted(map(_seconds, found.values())),
        )
    return names, _numbers(found, len(names))


def _times(said: tuple[RecordFields, ...], count: int) -> list[float] | None:
    """Seconds of each frame by `t` or `fps` of the nearest object that has one; None if none does."""
    for fields in said:
        if (times := fields.take("t")) is not None:
            return _numbers(times, count)
        if (rate := fields.number("fps")) is not None:
            return _at_rate(rate, count)
    return None


def _by_sample_rate(said: tuple[RecordFields, ...], count: int) -> list[float] | None:
    """Seconds of each frame where only `sample_fps` tells their rate, as qwen-vl-utils has it for lists of frames."""
    rates = (fields.number("sample_fps") for fields in said if fields.keys.kind == VIDEO.kind)
    rate = next((found for found in rates if found is not None), None)
    return None if rate is None else _at_rate(rate, count)


def _at_rate(rate: float, count: int) -> list[float]:
    if rate <= 0:
        raise Skip("frames without times", f"fps {rate:g}")
    return [index / rate for index in range(count)]


def _numbers(value: Any, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        raise Skip("frames without times", f"{count} frames, times {str(value)[:80]}")
    return [_seconds(item) for item in value]


def _seconds(value: Any) -> float:
    return number(value, "time of a frame")


def _part(said: tuple[RecordFields, ...], of_file: bool, rate_known: bool = True) -> dict[str, Any]:
    """Fields of Video that narrow it: the nearest object's words first."""
    found: dict[str, Any] = {}
    for fields in said:
        if (
            fields.keys.kind == VIDEO.kind
        ):  # a record has one rate and one time for all its videos: only frames take them
            told = _told(fields, of_file, rate_known)
            found |= {
                name: value
                for name, value in told.items()
                if value is not None and name not in found
            }
    return found


def _told(fields: RecordFields, of_file: bool, rate_known: bool) -> dict[str, Any]:
    in_part = fields.keys is VIDEO_PART
    rates = ("sample_fps", "fps") if of_file and in_part else ("sample_fps",)
    pixels = fields.whole("total_pixels")
    return {
        "start": fields.number("start", "video_start"),
        "end": fields.number("end", "video_end"),
        "sample_fps": fields.number(*rates) if rate_known else None,
        "max_frames": fields.whole("max_frames", "nframes")
        if in_part
        else fields.whole("max_frames"),
        "total_pixels": pixels * 2 if pixels is not None and in_part else pixels,
    }
