"""Converting a source: from its format, part by part, to indexed shards, with a line for every record left out."""

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError, unknown
from visionloom.common.progress import Progress
from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.formats.folder import Folder
from visionloom.data.convert.formats.hf import COLUMNS, HuggingFace
from visionloom.data.convert.formats.jsonl import JsonLines
from visionloom.data.convert.formats.llava import Llava
from visionloom.data.convert.formats.mmc4 import Mmc4
from visionloom.data.convert.formats.obelics import Obelics
from visionloom.data.convert.formats.omnicorpus import OmniCorpus
from visionloom.data.convert.formats.sharegpt import ShareGpt
from visionloom.data.convert.formats.webdataset import WebDataset
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft, SourceFormat, SourceOptions, SourceRecord
from visionloom.data.convert.trainable import Trainable
from visionloom.data.convert.urls import UrlIndex, build_index
from visionloom.data.shards.sample import SampleError
from visionloom.data.shards.sample_json import parse_sample
from visionloom.data.shards.write import SampleMembers, members_of
from visionloom.data.shards.write_parts import URLS, PartLog, SourcePart, Tally, Target, write_parts

SOURCES: Final[Mapping[str, type[SourceFormat]]] = {
    "llava": Llava,
    "sharegpt": ShareGpt,
    "obelics": Obelics,
    "omnicorpus": OmniCorpus,
    "mmc4": Mmc4,
    "hf": HuggingFace,
    "folder": Folder,
    "jsonl": JsonLines,
    "webdataset": WebDataset,
}
CONVERT_VERSION: Final = 2
"""Counts changes of what converters write: an unfinished conversion by another version is not continued."""
_OF_THE_FILE: Final = (
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
"""Errors of the system that concern one file."""
_FETCHED: Final = ("obelics", "omnicorpus", "mmc4")
"""Formats that name pictures by URL."""


@dataclass(frozen=True, slots=True)
class Request:
    """A source that is to be converted, and the options for it."""

    kind: str
    path: Path
    images_dir: Path | None = None
    columns: Mapping[str, str] | None = None
    limit: int | None = None
    """Records read at most."""
    stop: bool = False
    """True if the first bad record ends the conversion."""
    follow_links: bool = False
    task: str | None = None
    """Evaluation task of all samples that name none themselves."""
    trainable: Trainable = field(default_factory=Trainable)
    """Checks of a sample that is to be trained on."""

    def check(self, target: Path) -> None:
        """Raise UserError for a request that cannot be met."""
        path, images = self.path, self.images_dir
        if self.kind not in SOURCES:
            raise UserError(unknown("source kind", self.kind, list(SOURCES)))
        if not path.exists():
            raise UserError(f"no file or folder {path}")
        # Else the next run would read what this one writes.
        if path.is_dir() and target.resolve().is_relative_to(path.resolve()):
            raise UserError(f"{target} lies inside the source {path}: choose a folder beside it")
        if images is not None and not images.is_dir():
            raise UserError(f"--images-dir: no folder {images}")
        self._check_columns()

    def _check_columns(self) -> None:
        columns = self.columns or {}
        if columns and self.kind != "hf":
            raise UserError(f"--columns is for the kind hf, not {self.kind}")
        for role in sorted(columns):
            if role not in COLUMNS:
                raise UserError(f"--columns {role}=...: one of {', '.join(COLUMNS)} expected")


@dataclass(frozen=True, slots=True)
class Converter:
    """Reads a source part by part; picklable."""

    request: Request
    name: str
    options: SourceOptions
    part_records: int
    """Records of a part: about a shard, so that parts leave few small shards, and an interruption costs little."""
    trainable: Trainable

    def parts(self) -> Iterator[SourcePart]:
        """Yield the source's parts up to the limit, each with the number of its records that are wanted (None: all)."""
        request, size = self.request, self.part_records
        index = self.options.files.index
        if index is not None:
            build_index(index.images, index.folder, request.follow_links)

        source = SOURCES[request.kind]()
        left = request.limit
        for part in _gathered(source.parts(request.path, size, request.follow_links), size):
            wanted = part.records if left is None else min(left, part.records)
            yield SourcePart(wanted, (part.where, None if wanted == part.records else wanted))
            if left is not None:
                left -= wanted
                if left <= 0:
                    return

    def samples(self, part: SourcePart, log: PartLog) -> Iterator[SampleMembers]:
        """Yield the samples of a part, checked and ready to be written; records that cannot be converted go to `log`."""
        places, wanted = part.where
        source = SOURCES[self.request.kind]()
        records = chain.from_iterable(map(source.records, places))
        for record in islice(records, wanted):
            log.tally.counts["records"] += 1
            draft = SampleDraft()
            try:
                members = self._members(source, record, draft)
            except Skip as skip:
                self._leave_out(record, skip, log)
                continue
            log.tally.counts["samples"] += 1
            for note in _notes(draft):
                log.tally.note(note, record.place)
            yield members

    def _members(
        self, source: SourceFormat, record: SourceRecord, draft: SampleDraft
    ) -> SampleMembers:
        """Return the members of one sample that can be trained on; raises Skip for any fault of the record."""
        if isinstance(record.value, Skip):
            raise record.value
        try:
            source.convert(record.value, draft, self.options)
            # A record's own task wins.
            draft.task = draft.task or self.request.task
            sample = draft.sample(f"{self.name}:{draft.id or record.place}")
            members = members_of(sample, draft.media)
            # As it will be read: the bytes of its JSON come first.
            self.trainable.check(parse_sample(members[0][1]))
            return members
        except SampleError as error:
            raise Skip("breaks the schema", str(error)) from error
        except (UserError, Skip, MemoryError):
            raise
        except OSError as error:
            # A disk or network that fails is no reason to lose records.
            if error.errno not in _OF_THE_FILE:
                raise
            raise Skip("file cannot be read", str(error)) from error
        except Exception as error:
            # A record from elsewhere may cause any error: it is left out, with the error's name.
            raise Skip("malformed record", f"{type(error).__name__}: {error}") from error

    def _leave_out(self, record: SourceRecord, skip: Skip, log: PartLog) -> None:
        if self.request.stop:
            raise UserError(f"{record.place}: {skip} (--on-error skip leaves it out and goes on)")
        log.tally.counts["left out"] += 1
        log.tally.note(f"left out: {skip.reason}", record.place)
        # Details may hold whole texts of a record.
        detail = skip.detail[:500]
        log.skipped.append({"record": record.place, "reason": skip.reason, "detail": detail})


def _notes(draft: SampleDraft) -> Iterator[str]:
    """Yield the lines of the summary for a sample that was made."""
    for reason in draft.left_out:
        yield f"pictures left out: {reason}"
    for _ in draft.meta.get("changed", ()):
        yield "pictures changed"
    for key in draft.unread:
        yield f"not read: {key}"
    yield from draft.notes


def _gathered(parts: Iterator[SourcePart], size: int) -> Iterator[SourcePart]:
    """Join small parts, of many small files, to parts of at most `size` records; `where` becomes a tuple."""
    places, records = list[Any](), 0
    for part in parts:
        # A part alone may be larger: it is not cut.
        if places and records + part.records > size:
            yield SourcePart(records, tuple(places))
            places, records = [], 0
        places.append(part.where)
        records += part.records
    if places:
        yield SourcePart(records, tuple(places))


def convert(request: Request, target: Target, progress: Progress) -> Tally:
    """Convert a source and return the counts: records, samples, those left out and why, keys not read, pictures changed.

    Nothing is fetched from a network. Raises UserError for a source that is not there or of another format.
    """
    request.check(target.folder)
    images = request.images_dir
    folder = request.path if request.path.is_dir() else request.path.parent
    roots = (folder,) if images is None else (images, folder)
    index = None
    if request.kind in _FETCHED and images is not None:
        index = UrlIndex(target.staging / URLS, images)

    files = MediaFiles(roots, index, request.follow_links)
    options = SourceOptions(files, request.columns or {})
    records = target.limits.samples
    converter = Converter(request, target.name, options, records, request.trainable)
    return write_parts(converter, target, _settings(request), progress)


def _settings(request: Request) -> dict[str, Any]:
    """Return the settings, as JSON, that the bytes of the dataset depend on."""
    state, images = request.path.stat(), request.images_dir
    return {
        "version": CONVERT_VERSION,
        "kind": request.kind,
        "source": str(request.path.resolve()),
        "source bytes": state.st_size if request.path.is_file() else None,
        "images_dir": None if images is None else str(images.resolve()),
        "columns": dict(sorted((request.columns or {}).items())),
        "limit": request.limit,
        "follow_links": request.follow_links,
        "task": request.task,
        **request.trainable.settings,
    }
