"""dataset.json: the shards of a dataset with their counts, and what they hold in all."""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from visionloom.common.atomic import replacing
from visionloom.common.count import Count
from visionloom.common.errors import UserError
from visionloom.common.jsonfile import LARGEST, JsonError, checked, load_json, parse_json
from visionloom.common.places import PlaceError, read_located
from visionloom.data.shards.sample import SCHEMA_VERSION, Image, Sample, Text, Think, Video

MANIFEST: Final = "dataset.json"


@dataclass(slots=True)
class Statistics:
    """Counts over samples, by what the samples say of their media."""

    images: int = 0
    videos: int = 0
    frames: int = 0
    """Frames of the videos as stored, before sampling."""
    pixels: int = 0
    """Of all pictures and frames."""
    duration: float = 0.0
    """Seconds of all videos."""
    text_bytes: int = 0
    """UTF-8 bytes of text and reasoning."""
    tasks: dict[str, int] = field(default_factory=dict)
    """Samples of each evaluation task."""
    suspect_media: int = 0
    """Members whose header cannot be read or differs from what the sample says."""
    left_out: list[tuple[int, str, str]] = field(default_factory=list)
    """Offset, key and error of what `index --skip-bad` left out."""

    @classmethod
    def of(cls, samples: Iterable[Sample | None]) -> "Statistics":
        """Count samples."""
        statistics = cls()
        for sample in samples:
            if sample is not None:
                statistics._count(sample)
        return statistics

    def _count(self, sample: Sample) -> None:
        if sample.task:
            self.tasks[sample.task] = self.tasks.get(sample.task, 0) + 1
        for element in sample.elements:
            if isinstance(element, Text | Think):
                self.text_bytes += len(element.text.encode())
            elif isinstance(element, Image):
                self.images += 1
                self.pixels += element.width * element.height
            elif isinstance(element, Video):
                self._count_video(element)

    def _count_video(self, video: Video) -> None:
        self.videos += 1
        self.frames += video.frame_count
        self.pixels += video.frame_count * video.width * video.height
        # Frames without a file have no duration of their own.
        self.duration += video.duration or video.times[-1] - video.times[0]

    def __add__(self, other: "Statistics") -> "Statistics":
        sums: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            if item.name != "tasks":
                sums[item.name] = getattr(self, item.name) + getattr(other, item.name)

        tasks: dict[str, int] = {}
        for task in sorted({*self.tasks, *other.tasks}):
            tasks[task] = self.tasks.get(task, 0) + other.tasks.get(task, 0)
        return Statistics(tasks=tasks, **sums)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """The row of one shard in dataset.json."""

    file: str
    samples: int
    bytes: int
    sha256: str
    """Of the index file."""
    content: str
    """Hash of what is in the shard: places, names and CRC-32 of all members."""
    statistics: Statistics = field(default_factory=Statistics)


def write_manifest(folder: Path, shards: list[ShardInfo]) -> None:
    """Write dataset.json of a folder whose shards are indexed."""
    total = sum((shard.statistics for shard in shards), Statistics())
    document = {
        "schema_version": SCHEMA_VERSION,
        "samples": sum(shard.samples for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "statistics": _counts(total),
        "shards": [_row(shard) for shard in shards],
    }
    text = json.dumps(document, indent=1, ensure_ascii=False)
    with replacing(folder / MANIFEST) as file:
        file.write((text + "\n").encode())


def _row(shard: ShardInfo) -> dict[str, Any]:
    """Return a shard's JSON object; its keys are the fields of ShardInfo, in their order."""
    names = [item.name for item in dataclasses.fields(shard)]
    row = {name: getattr(shard, name) for name in names}
    return row | {"statistics": _counts(shard.statistics)}


def _counts(statistics: Statistics) -> dict[str, Any]:
    # The list itself is in the index: it may be long.
    return dataclasses.asdict(statistics) | {"left_out": len(statistics.left_out)}


def read_manifest(folder: Path, option: str) -> tuple[ShardInfo, ...]:
    """Return the shards of a folder by its dataset.json.

    Raises UserError as `parse_manifest`, FileNotFoundError if there is none.
    """
    try:
        content = read_located(folder, MANIFEST, LARGEST)
    except PlaceError as error:
        raise UserError(
            f"{option}: {folder / MANIFEST} {error}: run python launch/data.py index {folder}"
        ) from None
    return parse_manifest(content, str(folder / MANIFEST), option)


def parse_manifest(content: bytes, where: str, option: str) -> tuple[ShardInfo, ...]:
    """Return the shards that a dataset.json names; what was left out of them stands in their indexes.

    Raises UserError, naming the option, the file and the field, if it is damaged, of another schema, empty, or leads out of its
    folder.
    """
    folder = where.removesuffix("/" + MANIFEST)
    fix = f"run python launch/data.py index {folder}"
    try:
        document = load_json(content, where)
        # Before its fields are checked: those of another version may differ.
        version = document.get("schema_version") if isinstance(document, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            problem = f"schema version {version!r:.20}, this program reads {SCHEMA_VERSION}"
            raise UserError(f"{option}: {where} has {problem}: {fix}")
        rows = checked(document, _Document, where).shards
    except JsonError as error:
        raise UserError(f"{option}: {error}: the file is damaged or old: {fix}") from None

    for row in rows:
        if not is_shard_name(row.file):
            problem = "names a shard that is no file of its folder or has a control character"
            raise UserError(f"{option}: {where} {problem}: {row.file!r:.100}")
    # Samples of a shard named twice would be drawn twice.
    if len({row.file for row in rows}) < len(rows):
        raise UserError(f"{option}: {where} names a shard twice: {fix}")
    if not sum(row.samples for row in rows):
        raise UserError(f"{option}: {folder} holds no samples")
    return tuple(row.info() for row in rows)


_NAME: Final = re.compile(r"(?!\.)[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,250}")


def is_shard_name(name: str) -> bool:
    """Return whether a shard may have this name: a file of the folder itself, not hidden, in valid Unicode without control characters."""
    return _NAME.fullmatch(name) is not None


UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
"""A count for which an index file has four bytes."""
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class _Sums:
    """The sums that statistics have in dataset.json and in an index file alike."""

    images: Count
    videos: Count
    frames: Count
    pixels: Count
    duration: Seconds
    text_bytes: Count
    tasks: dict[str, Count]
    suspect_media: Count


@dataclass(frozen=True, slots=True)
class _Counts(_Sums):
    """Statistics as dataset.json has them: only the number of what was left out."""

    left_out: Count = 0


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard as dataset.json has it."""

    file: str
    samples: UInt32
    bytes: Count
    sha256: str
    content: str
    statistics: _Counts

    def info(self) -> ShardInfo:
        """Return the row as the rest of the program knows it; what was left out stands in the index."""
        statistics = _statistics(self.statistics)
        # dataset.json has only their number.
        statistics.left_out = []
        file = (self.file, self.samples, self.bytes)
        return ShardInfo(*file, self.sha256, self.content, statistics)


@dataclass(frozen=True, slots=True)
class _Document:
    """dataset.json."""

    schema_version: int
    samples: Count
    bytes: Count
    statistics: _Counts
    shards: tuple[_Shard, ...]


@dataclass(frozen=True, slots=True)
class _IndexStatistics(_Sums):
    """Statistics as an index file has them."""

    left_out: list[tuple[Count, str, str]]


def parse_statistics(content: bytes, where: str) -> Statistics:
    """Read the statistics at the end of an index file; raises JsonError."""
    return _statistics(parse_json(content, _IndexStatistics, where))


def _statistics(values: _Sums) -> Statistics:
    names = [item.name for item in dataclasses.fields(Statistics)]
    return Statistics(**{name: getattr(values, name) for name in names})
