"""Videos of a source: a file, a folder of extracted frames with their times, or a list of frames."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import Draft
from visionloom.data.probe import kind_of
from visionloom.data.sample import Video

TIMES: Final = "times.json"
"""In a folder of frames: a list of seconds, one for each frame in sorted order, or {"frame.jpg": seconds}."""
_SECONDS: Final = {"start": "start", "end": "end", "video_start": "start", "video_end": "end", "sample_fps": "sample_fps"}
"""Names in objects and typed parts, and the fields of Video that they are."""
_COUNTS: Final = ("max_frames", "total_pixels")


def add_video(draft: Draft, files: MediaFiles, value: Any, record: Mapping[str, Any]) -> Video:
    """Add the video that `value` means: a name of a file or of a folder of frames, a list of frames, or an object.

    An object is {"file": ...} or {"frames": [...]} with what narrows it (start, end in seconds, sample_fps, max_frames,
    total_pixels); a typed part of a turn ({"type": "video", ...}) is one too. Times of frames come from `t` (seconds) or
    `fps` (of the frames given) there or in the record, else from times.json in the folder; they are never guessed.
    Raises Skip.
    """
    facts, narrowed = dict(record), record if record.get("type") == "video" else {}
    if isinstance(value, dict):
        facts, narrowed = {**record, **value}, value
        value = value.get("file", value.get("path", value.get("frames")))
    part = _part(narrowed)
    number = sum(name.startswith("vid") for name in {ref.partition(".")[0] for ref in draft.media})
    if isinstance(value, list):
        return draft.frames([files.read(ref) for ref in value], _times(facts, len(value)), number, **part)
    path = files.locate(value)
    if path.is_dir():
        return _folder(draft, files, path, facts, number, part)
    return draft.video(files.read(value), number, **part)


def _folder(
    draft: Draft, files: MediaFiles, path: Path, facts: Mapping[str, Any], number: int, part: Mapping[str, Any]
) -> Video:
    names = sorted(file.name for file in path.iterdir() if kind_of(file.name) == "image")
    listed = path / TIMES
    if facts.get("t") is None and facts.get("fps") is None and listed.is_file():
        names, times = _listed(listed, names)
    else:
        times = _times(facts, len(names))
    return draft.frames([files.read(str(path.absolute() / name)) for name in names], times, number, **part)


def _listed(path: Path, names: list[str]) -> tuple[list[str], list[float]]:
    """Frames and times by a times.json."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise Skip("broken times.json", str(path)) from None
    if isinstance(found, dict):
        names, found = sorted(found, key=lambda name: (_seconds(found[name]), name)), sorted(map(_seconds, found.values()))
    return names, _numbers(found, len(names))


def _times(facts: Mapping[str, Any], count: int) -> list[float]:
    if facts.get("t") is not None:
        return _numbers(facts["t"], count)
    if facts.get("fps") is None:
        raise Skip("frames without times", "give t (a list of seconds), fps, or times.json in the folder")
    rate = _seconds(facts["fps"])
    if rate <= 0:
        raise Skip("frames without times", f"fps {rate:g}")
    return [index / rate for index in range(count)]


def _numbers(value: Any, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count:
        raise Skip("frames without times", f"{count} frames, times {str(value)[:80]}")
    return [_seconds(item) for item in value]


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise Skip("broken time", repr(value)[:80])
    return float(value)


def _part(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Video that narrow it."""
    found: dict[str, Any] = {}
    for name, field in _SECONDS.items():
        if facts.get(name) is not None:
            found[field] = _seconds(facts[name])
    for name in _COUNTS:
        if facts.get(name) is not None:
            found[name] = int(_seconds(facts[name]))
    return found
