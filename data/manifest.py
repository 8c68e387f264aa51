"""dataset.json: the shards of a dataset with their counts, and what they hold in all."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.data.sample import SCHEMA_VERSION, Sample, Text, Think, Video

MANIFEST: Final = "dataset.json"


@dataclass(slots=True)
class Statistics:
    """Counts over samples, by what the samples say of their media."""

    images: int = 0
    videos: int = 0
    frames: int = 0
    """Frames of the videos, before any is chosen."""
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
        found = cls()
        for sample in samples:
            if sample is not None:
                found._count(sample)
        return found

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Statistics":
        """From JSON; raises TypeError for a value of another type."""
        found = cls(**{item.name: values[item.name] for item in dataclasses.fields(cls)})
        found.left_out = [(int(offset), str(key), str(error)) for offset, key, error in found.left_out]
        return found

    def _count(self, sample: Sample) -> None:
        if sample.task:
            self.tasks[sample.task] = self.tasks.get(sample.task, 0) + 1
        self.images += len(sample.images)
        self.pixels += sum(image.width * image.height for image in sample.images)
        for element in sample.elements:
            if isinstance(element, Text | Think):
                self.text_bytes += len(element.text.encode())
            elif isinstance(element, Video):
                self.videos += 1
                self.frames += element.frame_count
                self.pixels += element.frame_count * element.width * element.height
                self.duration += element.duration or element.times[-1] - element.times[0]

    def __add__(self, other: "Statistics") -> "Statistics":
        tasks = {task: self.tasks.get(task, 0) + other.tasks.get(task, 0) for task in sorted({*self.tasks, *other.tasks})}
        names = [item.name for item in dataclasses.fields(self) if item.name != "tasks"]
        return Statistics(tasks=tasks, **{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What dataset.json says of one shard."""

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
        "shards": [
            {
                "file": shard.file,
                "samples": shard.samples,
                "bytes": shard.bytes,
                "sha256": shard.sha256,
                "content": shard.content,
                "statistics": _counts(shard.statistics),
            }
            for shard in shards
        ],
    }
    with replacing(folder / MANIFEST) as file:
        file.write((json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _counts(statistics: Statistics) -> dict[str, Any]:
    return dataclasses.asdict(statistics) | {"left_out": len(statistics.left_out)}


def parse_manifest(content: bytes, where: str, option: str) -> tuple[ShardInfo, ...]:
    """The shards that a dataset.json names; what was left out of them is a matter of their indexes.

    Raises UserError, naming the option and the file, if it is damaged, of another schema, empty, or leads out of its folder.
    """
    folder = where.removesuffix("/" + MANIFEST)
    try:
        document = json.loads(content)
        version, shards = document["schema_version"], tuple(_shard(row) for row in document["shards"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{option}: {where} is damaged or old: run python launch/data.py index {folder}") from None
    if version != SCHEMA_VERSION:
        raise UserError(f"{option}: {where} has schema version {version!r}, this program reads {SCHEMA_VERSION}")
    for shard in shards:
        if Path(shard.file).name != shard.file:
            raise UserError(f"{option}: {where} names a shard outside its folder: {shard.file!r}")
    if not sum(shard.samples for shard in shards):
        raise UserError(f"{option}: {folder} holds no samples")
    return shards


def _shard(row: Mapping[str, Any]) -> ShardInfo:
    statistics = Statistics.read({**row["statistics"], "left_out": []})
    return ShardInfo(row["file"], int(row["samples"]), int(row["bytes"]), row["sha256"], row["content"], statistics)
