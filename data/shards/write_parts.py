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
"""Folder inside of it, in which a converter looks pictures up."""
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
    """Counts by name, and the first record that each name was met in."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, record: str) -> None:
        """Count one more of this name, met in this record."""
        self.counts[name] += 1
        self.first.setdefault(name, record)

    def add(self, other: "Tally") -> None:
        """Add what was counted in later records."""
        self.counts.update(other.counts)
        # The earlier record wins.
        self.first = {**other.first, **self.first}


@dataclass(slots=True)
class PartLog:
    """The fate of the records of one part."""

    tally: Tally = field(default_factory=Tally)
    skipped: list[Mapping[str, Any]] = field(default_factory=list)
    """A JSON object for each record that was left out."""


class PartReader(Protocol):
    """A source as samples: picklable, and the same parts and samples each time."""

    def parts(self) -> Iterator[SourcePart]:
        """Yield the pieces of the source, in order."""
        ...

    def samples(self, part: SourcePart, log: PartLog) -> Iterator[SampleMembers]:
        """Yield the members of a part's samples in order (see `members_of`); `log` takes what was left out."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """The folder, name and limits of a dataset that is written, and the processes that write it."""

    folder: Path
    name: str
    limits: ShardLimits
    workers: int

    @property
    def staging(self) -> Path:
        """Return the folder of the finished parts."""
        return self.folder / STAGING


def write_parts(
    reader: PartReader, target: Target, settings: Mapping[str, Any], progress: Progress
) -> Tally:
    """Write a source as an indexed dataset and return what was counted; the same call again continues.

    `settings` (JSON values) say what the bytes depend on: a folder that was begun with others is refused. Raises
    UserError for that, for a folder that holds another dataset or is being written now, and if no sample is left.
    """
    with begin(target, settings) as complete:
        if complete is not None:
            return complete
        parts = _write_all(reader, target, progress)
        return finish(target, parts, settings)


@contextmanager
def begin(target: Target, settings: Mapping[str, Any]) -> Iterator[Tally | None]:
    """Begin a dataset, or continue one, as its only writer; raises UserError as `write_parts` does.

    Yields the counts of one that is complete, else None: its parts are to be written, by this process or others of its.
    """
    settings = _settings_of(target, settings)
    complete = _complete(target.folder, settings)
    if complete is not None:
        # It may have been interrupted just before the folder of the parts was removed.
        shutil.rmtree(target.staging, ignore_errors=True)
        yield complete
        return

    # Refused before anything is written into it.
    check_target(target.folder, target.name)
    target.staging.mkdir(parents=True, exist_ok=True)
    with _only_writer(target.staging):
        _check_settings(target.staging, settings)
        yield None


def finish(target: Target, parts: int, settings: Mapping[str, Any]) -> Tally:
    """Put a number of parts together, all of them written, and return what was counted; raises UserError if no sample is left."""
    tally = Tally()
    for number in range(parts):
        done = _done(target.staging, number)
        tally.add(Tally(Counter(done["counts"]), done["first"]))
    counts = dict(sorted(tally.counts.items()))
    facts = {"settings": _settings_of(target, settings), "counts": counts, "first": tally.first}
    _put_together(target, parts, facts)
    shutil.rmtree(target.staging)
    return tally


def is_written(target: Target, number: int) -> bool:
    """Return whether a part is written."""
    return _done_path(target.staging, number).exists()


def _settings_of(target: Target, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {**settings, "name": target.name, "limits": asdict(target.limits)}


def _complete(folder: Path, settings: Mapping[str, Any]) -> Tally | None:
    """Return the counts of a dataset that is complete and was made with these settings; None for any other."""
    if not (folder / MANIFEST).exists():
        return None
    try:
        facts = load_json(read_located(folder, FACTS, LARGEST), FACTS)
    except (OSError, JsonError, PlaceError):
        return None
    # A file of this name may be anybody's.
    if not isinstance(facts, dict) or not _are_counts(facts):
        return None
    if facts.get("settings") != settings:
        return None
    return Tally(Counter(facts["counts"]), facts["first"])


def _are_counts(document: Mapping[str, Any]) -> bool:
    """Return whether a document has the counts of a tally."""
    counts, first = document.get("counts"), document.get("first")
    if not isinstance(counts, dict) or not isinstance(first, dict):
        return False
    are_numbers = all(type(count) is int for count in counts.values())
    return are_numbers and all(isinstance(place, str) for place in first.values())


@contextmanager
def _only_writer(staging: Path) -> Iterator[None]:
    with open(staging / "lock", "w") as file:
        # The lock goes with the process, however that ends.
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
    if not path.exists() or not any(staging.glob("part*.json")):
        # Pictures that were looked up may be of another source.
        shutil.rmtree(staging / URLS, ignore_errors=True)
        _write(path, json.dumps(settings).encode())
        return

    begun = _read(staging, path.name)
    # Also names that only the older version had.
    for name in [*settings, *begun]:
        then, now = begun.get(name), settings.get(name)
        if then != now:
            raise UserError(
                f"{staging.parent} holds an unfinished conversion with {name}={then!r}, now it is"
                f" {now!r}: use the same words again, or remove {staging}"
            )


# ---- writing parts


def _write_all(reader: PartReader, target: Target, progress: Progress) -> int:
    """Write the parts that are not there yet; return the number of parts."""
    if target.workers > 1:
        return _write_with_processes(reader, target, progress)

    written = known = parts = 0
    for number, part in enumerate(reader.parts()):
        known, parts = known + part.records, number + 1
        progress(written, known)
        write_part(reader, target, (number, part))
        written += part.records
    progress(written, written)
    return parts


def _write_with_processes(reader: PartReader, target: Target, progress: Progress) -> int:
    """Write parts by `target.workers` processes while the source is still being cut; return the number of parts."""
    written = known = parts = 0

    def cut() -> Iterator[tuple[int, SourcePart]]:
        nonlocal known, parts
        for number, part in enumerate(reader.parts()):
            known += part.records
            parts += 1
            yield number, part

    write = functools.partial(write_part, reader, target)
    try:
        # webdataset imports torch, which takes seconds: once, for all workers.
        finished = as_finished(write, cut(), target.workers, preload=["webdataset"])
        for (_, part), _ in finished:
            written += part.records
            progress(written, known)
    except ChildProcessError as error:
        raise ChildProcessError(f"{error}: the same command continues") from None
    return parts


def write_part(reader: PartReader, target: Target, numbered: tuple[int, SourcePart]) -> None:
    """Write one part's shards and then its facts, unless they are there."""
    number, part = numbered
    staging = target.staging
    # Parts are plain values: the same part of the same source has the same digest.
    digest = hashlib.sha256(repr(part).encode()).hexdigest()
    if _done_path(staging, number).exists():
        if _done(staging, number).get("digest") != digest:
            problem = f"the source changed since {target.folder} was begun"
            raise UserError(f"{problem}: remove {staging} and start again")
        return

    # Shards without the part's facts may be of another attempt.
    for leftover in staging.glob(f"*{number:06d}-*"):
        leftover.unlink()

    def path(shard: int) -> Path:
        return staging / f"{number:06d}-{shard:04d}.tar"

    def key(row: int) -> str:
        return f"{number:06d}-{row:07d}"

    log = PartLog()
    shards = list(cut_shards(reader.samples(part, log), path, key, target.limits))
    facts = {
        "digest": digest,
        "shards": [shard.file for shard in shards],
        "counts": dict(log.tally.counts),
        "first": log.tally.first,
        "skipped": log.skipped,
    }
    _write(_done_path(staging, number), _json(facts))


def _done_path(staging: Path, number: int) -> Path:
    return staging / f"part{number:06d}.json"


def _done(staging: Path, number: int) -> dict[str, Any]:
    """Return the facts of a finished part: its digest, its shards, and what `Tally` and `PartLog` hold."""
    path = _done_path(staging, number)
    facts = _read(staging, path.name)
    are_lists = _are_file_names(facts.get("shards")) and isinstance(facts.get("skipped"), list)
    if not are_lists or not _are_counts(facts):
        raise UserError(f"{path} is damaged: remove {staging} and start again")
    return facts


def _are_file_names(shards: Any) -> bool:
    """Return whether a value is a list of names of tars, none of which leads out of the folder."""
    if not isinstance(shards, list):
        return False
    for file in shards:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".tar"):
            return False
    return True


def _read(staging: Path, name: str) -> dict[str, Any]:
    """Read a JSON object that an earlier command left; raises UserError."""
    try:
        # Not by `checked`: names of files in it may be no valid Unicode.
        document = load_json(read_located(staging, name, LARGEST), str(staging / name))
    except (JsonError, PlaceError) as error:
        raise UserError(f"{error}: remove {staging} and start again") from None
    if not isinstance(document, dict):
        raise UserError(f"{staging / name} is no JSON object: remove {staging} and start again")
    return document


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def _json(value: Any, indent: int | None = None) -> bytes:
    """Return JSON in UTF-8; a name of a file that is no valid Unicode is escaped in it, and read back as it was."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.encode(errors="backslashreplace")


# ---- putting parts together


def _put_together(target: Target, parts: int, facts: Mapping[str, Any]) -> None:
    """Number the shards of all parts, gather what was skipped, and write dataset.json last."""
    shards: list[ShardInfo] = []
    with replacing(target.folder / SKIPPED) as skipped:
        for number in range(parts):
            part = _done(target.staging, number)
            for record in part["skipped"]:
                skipped.write(_json(record) + b"\n")
            for file in part["shards"]:
                shards.append(_place(target, file, len(shards)))

    _write(target.folder / FACTS, _json(facts, indent=1) + b"\n")
    if not shards:
        reason = f"{SKIPPED} there says why, record by record"
        raise UserError(f"{target.folder}: no sample could be converted: {reason}")
    write_manifest(target.folder, shards)


def _place(target: Target, file: str, number: int) -> ShardInfo:
    """Move a shard and its index out of the staging folder; what was moved before an interruption stays."""
    staged = target.staging / file
    path = shard_path(target.folder, target.name, number)
    with suppress(FileNotFoundError):
        os.replace(staged, path)
    with suppress(FileNotFoundError):
        os.replace(index_path(staged), index_path(path))
    if not path.is_file():
        raise UserError(f"{staged} is gone: remove {target.staging} and start again")
    return known_shard(path) or index_shard(path)
