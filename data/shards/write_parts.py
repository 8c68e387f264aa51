"""Writing a large source as shards by several processes, part by part, so that an interrupted command continues.

A source is cut into parts, in order and without looking at the media. A process writes a part as complete shards of its
own into `.converting/` and then the part's facts. When all parts are there, the shards get their running numbers, and
`dataset.json` comes last. Neither the number of processes nor an interruption has an effect on any byte.
"""

import fcntl
import functools
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.jsonfile import LARGEST, JsonError, load_json
from visionloom.common.places import PlaceError, read_located
from visionloom.common.processes import as_finished
from visionloom.common.progress import Progress
from visionloom.data.shards.index import index_path, index_shard, known_shard
from visionloom.data.shards.manifest import MANIFEST, ShardInfo, write_manifest
from visionloom.data.shards.write import (
    SampleMembers,
    ShardLimits,
    check_target,
    cut_shards,
    shard_path,
)

STAGING: Final = ".converting"
"""Folder of what is finished so far; gone when the dataset is complete."""
URLS: Final = "urls"
"""Folder inside of it: what a converter looks pictures up in."""
FACTS: Final = "convert.json"
"""How the dataset was made, and what was counted."""
SKIPPED: Final = "skipped.jsonl"
"""One JSON line for each record that was left out."""


@dataclass(frozen=True, slots=True)
class SourcePart:
    """A piece of a source: `records` of it, wherever `where` says (plain, picklable values)."""

    records: int
    where: Any


@dataclass(slots=True)
class Tally:
    """What was counted, by name, and the first record that each name was met in."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, record: str) -> None:
        """Count one more of this name, met in this record."""
        self.counts[name] += 1
        self.first.setdefault(name, record)

    def add(self, other: "Tally") -> None:
        """Add what was counted in later records."""
        self.counts.update(other.counts)
        self.first = {**other.first, **self.first}


@dataclass(slots=True)
class PartLog:
    """What happened to the records of one part."""

    tally: Tally = field(default_factory=Tally)
    skipped: list[Mapping[str, Any]] = field(default_factory=list)
    """A JSON object for each record that was left out."""


class PartReader(Protocol):
    """What is written: picklable, and the same parts and samples each time."""

    def parts(self) -> Iterator[SourcePart]:
        """The source, cut."""
        ...

    def samples(self, part: SourcePart, log: PartLog) -> Iterator[SampleMembers]:
        """The members of a part's samples in order (see `members_of`); `log` takes what was left out."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how a dataset is written."""

    folder: Path
    name: str
    limits: ShardLimits
    workers: int

    @property
    def staging(self) -> Path:
        """Folder of the finished parts."""
        return self.folder / STAGING


def write_parts(
    reader: PartReader, target: Target, settings: Mapping[str, Any], progress: Progress
) -> Tally:
    """Write a source as an indexed dataset and return what was counted; the same call again continues.

    `settings` (JSON values) say what the bytes depend on: a folder that was begun with others is refused. Raises
    UserError for that, for a folder that holds another dataset or is being written now, and if no sample is left.
    """
    begun = {**settings, "name": target.name, "limits": asdict(target.limits)}
    if (
        (facts := _facts(target.folder))
        and (target.folder / MANIFEST).exists()
        and facts.get("settings") == begun
    ):
        shutil.rmtree(target.staging, ignore_errors=True)
        return Tally(Counter(facts["counts"]), facts["first"])
    check_target(target.folder, target.name)
    target.staging.mkdir(parents=True, exist_ok=True)
    with _only_writer(target.staging):
        _check_settings(target.staging, begun)
        parts = _write_all(reader, target, progress)
        tally = Tally()
        for number in range(parts):
            done = _done(target.staging, number)
            tally.add(Tally(Counter(done["counts"]), done["first"]))
        _put_together(
            target,
            parts,
            {"settings": begun, "counts": dict(sorted(tally.counts.items())), "first": tally.first},
        )
    shutil.rmtree(target.staging)
    return tally


def _facts(folder: Path) -> dict[str, Any]:
    """What convert.json says, if it is what `write_parts` writes."""
    try:
        found = load_json(read_located(folder, FACTS, LARGEST), FACTS)
    except (OSError, JsonError, PlaceError):
        return {}
    return found if isinstance(found, dict) and _are_counts(found) else {}


def _are_counts(found: Mapping[str, Any]) -> bool:
    """Whether a document has the counts of a tally."""
    counts, first = found.get("counts"), found.get("first")
    return (
        isinstance(counts, dict)
        and all(type(count) is int for count in counts.values())
        and isinstance(first, dict)
        and all(isinstance(place, str) for place in first.values())
    )


@contextmanager
def _only_writer(staging: Path) -> Iterator[None]:
    with open(staging / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{staging.parent} is being written by another process: wait for it or end it"
            ) from None
        yield


def _check_settings(staging: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to continue what was begun with other settings; with nothing finished there is nothing to continue."""
    path = staging / "settings.json"
    if path.exists() and any(staging.glob("part*.json")):
        found = _read(staging, path.name)
        for name in [*settings, *found]:
            if found.get(name) != settings.get(name):
                raise UserError(
                    f"{staging.parent} holds an unfinished conversion with {name}={found.get(name)!r}, now it is"
                    f" {settings.get(name)!r}: use the same words again, or remove {staging}"
                )
        return
    shutil.rmtree(staging / URLS, ignore_errors=True)
    with replacing(path) as file:
        file.write(json.dumps(settings).encode())


# ---- writing parts


def _write_all(reader: PartReader, target: Target, progress: Progress) -> int:
    """Write what is not there yet; returns the number of parts."""
    if target.workers <= 1:
        written = known = parts = 0
        for number, part in enumerate(reader.parts()):
            known, parts = known + part.records, number + 1
            progress(written, known)
            _write_part(reader, target, (number, part))
            written += part.records
        progress(written, written)
        return parts
    return _write_with_processes(reader, target, progress)


def _write_with_processes(reader: PartReader, target: Target, progress: Progress) -> int:
    written = known = parts = 0

    def cut() -> Iterator[tuple[int, SourcePart]]:
        nonlocal known, parts
        for number, part in enumerate(reader.parts()):
            known += part.records
            parts += 1
            yield number, part

    write = functools.partial(_write_part, reader, target)
    try:
        # webdataset imports torch, which takes seconds: once, for all workers
        for (_, part), _ in as_finished(write, cut(), target.workers, preload=["webdataset"]):
            written += part.records
            progress(written, known)
    except ChildProcessError as error:
        raise ChildProcessError(f"{error}: the same command continues") from None
    return parts


def _write_part(reader: PartReader, target: Target, numbered: tuple[int, SourcePart]) -> None:
    """Write one part's shards and then its facts, unless they are there."""
    number, part = numbered
    digest = hashlib.sha256(repr(part).encode()).hexdigest()
    if (path := _done_path(target.staging, number)).exists():
        if _done(target.staging, number).get("digest") != digest:
            raise UserError(
                f"the source changed since {target.folder} was begun: remove {target.staging} and start again"
            )
        return
    for leftover in target.staging.glob(f"*{number:06d}-*"):
        leftover.unlink()
    log = PartLog()
    shards = cut_shards(
        reader.samples(part, log),
        lambda shard: target.staging / f"{number:06d}-{shard:04d}.tar",
        lambda row: f"{number:06d}-{row:07d}",
        target.limits,
    )
    files = [shard.file for shard in shards]
    tally = {"counts": dict(log.tally.counts), "first": log.tally.first}
    with replacing(path) as file:
        file.write(_json({"digest": digest, "shards": files, **tally, "skipped": log.skipped}))


def _done_path(staging: Path, number: int) -> Path:
    return staging / f"part{number:06d}.json"


def _done(staging: Path, number: int) -> dict[str, Any]:
    """The facts of a finished part: its digest, its shards, and what `Tally` and `PartLog` hold."""
    path = _done_path(staging, number)
    found = _read(staging, path.name)
    shards, skipped = found.get("shards"), found.get("skipped")
    if (
        not _are_counts(found)
        or not isinstance(shards, list)
        or not all(
            isinstance(file, str) and Path(file).name == file and file.endswith(".tar")
            for file in shards
        )
        or not isinstance(skipped, list)
    ):
        raise UserError(f"{path} is damaged: remove {staging} and start again")
    return found


def _read(staging: Path, name: str) -> dict[str, Any]:
    """A JSON object that an earlier command left; raises UserError.

    Not by `checked`: names of files in it may be no valid Unicode.
    """
    try:
        found = load_json(read_located(staging, name, LARGEST), str(staging / name))
    except (JsonError, PlaceError) as error:
        raise UserError(f"{error}: remove {staging} and start again") from None
    if not isinstance(found, dict):
        raise UserError(f"{staging / name} is no JSON object: remove {staging} and start again")
    return found


def _json(value: Any, indent: int | None = None) -> bytes:
    """JSON in UTF-8; a name of a file that is no valid Unicode is escaped in it, and read back as it was."""
    return json.dumps(value, ensure_ascii=False, indent=indent).encode(errors="backslashreplace")


# ---- putting parts together


def _put_together(target: Target, parts: int, facts: Mapping[str, Any]) -> None:
    """Number the shards through, gather what was skipped, and write dataset.json last."""
    shards: list[ShardInfo] = []
    with replacing(target.folder / SKIPPED) as skipped:
        for number in range(parts):
            found = _done(target.staging, number)
            for record in found["skipped"]:
                skipped.write(_json(record) + b"\n")
            shards += [
                _place(target, file, len(shards) + place)
                for place, file in enumerate(found["shards"])
            ]
    with replacing(target.folder / FACTS) as file:
        file.write(_json(facts, indent=1) + b"\n")
    if not shards:
        raise UserError(
            f"{target.folder}: no sample could be converted: {SKIPPED} there says why, record by record"
        )
    write_manifest(target.folder, shards)


def _place(target: Target, file: str, number: int) -> ShardInfo:
    """Move a shard and its index out of the staging folder; what was moved before an interruption stays."""
    path = shard_path(target.folder, target.name, number)
    for source, end in (
        (target.staging / file, path),
        (index_path(target.staging / file), index_path(path)),
    ):
        with suppress(FileNotFoundError):
            os.replace(source, end)
    if not path.is_file():
        raise UserError(f"{target.staging / file} is gone: remove {target.staging} and start again")
    return known_shard(path) or index_shard(path)
