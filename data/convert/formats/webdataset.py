"""WebDataset tars made elsewhere: a picture or video with a caption (txt, or json with one), or samples of our schema."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar, Final

from visionloom.common.errors import UserError
from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.formats.captions import fill_caption
from visionloom.data.convert.formats.jsonl import ELEMENT, MESSAGE, SAMPLE, fill_from_schema
from visionloom.data.convert.keys import Keys, RecordFields, record_json, without_nulls
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft, SourceOptions, SourceRecord
from visionloom.data.convert.source_files import files_below
from visionloom.data.convert.videos import add_video
from visionloom.data.shards.media_header import kind_of
from visionloom.data.shards.sample import Image, Video
from visionloom.data.shards.tar import LARGEST_MEMBER, Fault, entries, members
from visionloom.data.shards.write_parts import SourcePart

_CAPTIONS: Final = ("caption", "text", "txt")
MEMBERS: Final = Keys(
    "member", {"txt": "the caption", "json": "facts with the caption, or a sample of our schema"}
)
"""The members of a sample by their endings; pictures and videos are read whatever they are called."""
DOCUMENT: Final = Keys(
    "record",
    {
        **dict.fromkeys(_CAPTIONS, "the caption, if there is no txt"),
        "url": "meta.url",
        "key": "meta.key",
    },
)
"""The json member."""


@dataclass(frozen=True, slots=True)
class Tar:
    """One tar file."""

    path: str


@dataclass(frozen=True, slots=True)
class _Members(MediaFiles):
    """The members of one sample in place of files."""

    members: Mapping[str, bytes] | None = None

    def read(self, ref: object, largest: int = LARGEST_MEMBER) -> bytes:
        """Return a member's bytes; raises Skip if the sample has none of this name."""
        data = (self.members or {}).get(ref) if isinstance(ref, str) else None
        if data is None:
            raise Skip("no such member", repr(ref)[:80])
        return data

    def locate(self, ref: object) -> Path:
        """Return the name itself: members are no folders."""
        return Path(str(ref))


class WebDataset:
    """One key a sample; a damaged place in a tar is a record left out, and the rest of the tar is read."""

    keys: ClassVar[tuple[Keys, ...]] = (MEMBERS, DOCUMENT, SAMPLE, MESSAGE, *ELEMENT.values())

    def parts(self, path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
        """Yield one tar each."""
        for tar in files_below(path, (".tar",), follow_links):
            yield SourcePart(_count(tar), Tar(str(tar)))

    def records(self, where: Tar) -> Iterator[SourceRecord]:
        """Yield one key after another, its members in memory."""
        path, faults = Path(where.path), list[Fault]()
        members = entries(path, faults.append)
        for key, group in groupby(members, key=lambda entry: _split(entry.name)[0]):
            value = {_split(entry.name)[1]: entry.data for entry in group}
            # Faults up to here were met on the way to this group.
            yield from _damaged(path, faults)
            faults.clear()
            yield SourceRecord(f"{path.name}:{key}", value)
        yield from _damaged(path, faults)

    def convert(
        self, value: Mapping[str, bytes], draft: SampleDraft, options: SourceOptions
    ) -> None:
        """Fill the draft with a document of the media and their caption, or a sample of our schema; raises Skip."""
        facts = record_json(value["json"]) if "json" in value else {}
        facts = without_nulls(facts) if isinstance(facts, dict) else {}
        files = _Members((), members=value)
        if "v" in facts and "kind" in facts:
            fill_from_schema(facts, draft, SourceOptions(files))
            return

        members = draft.open(MEMBERS, {name: name for name in value})
        names = [name for name in sorted(value) if kind_of(name) != "other"]
        # Media are read whatever they are called.
        members.take_all("json", *names)
        fields = draft.open(DOCUMENT, facts)
        text = _caption(value, members, fields)
        there = f"members {', '.join(value)}"
        if not names:
            raise Skip("no picture or video", there)
        if text is None:
            expected = f"txt, or json with one of {', '.join(_CAPTIONS)} expected"
            raise Skip("no caption", f"{there}: {expected}")

        for name in ("url", "key"):
            fact = fields.text(name)
            if fact:
                draft.meta[name] = fact
        fill_caption(draft, [_add(draft, files, name) for name in names], text)


def _split(name: str) -> tuple[str, str]:
    """Return key and ending: WebDataset ends the key at the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    # These two are looked up by name.
    if ending.lower() in ("json", "txt"):
        ending = ending.lower()
    return folder + slash + key, ending


def _count(path: Path) -> int:
    """Count the samples in a tar, up to the first damage: for progress and limits."""
    count, last = 0, ""
    with suppress(UserError):
        for member, _ in members(path):
            key, _ = _split(member.name)
            count += key != last
            last = key
    return count


def _damaged(path: Path, faults: list[Fault]) -> Iterator[SourceRecord]:
    """Yield a record to leave out for each fault of a tar."""
    for fault in faults:
        yield SourceRecord(f"{path.name}:{fault.offset}", Skip("damaged tar", str(fault)))


def _add(draft: SampleDraft, files: MediaFiles, name: str) -> Image | Video:
    if kind_of(name) == "video":
        return add_video(draft, files, name)
    return draft.image(files.read(name))


def _caption(value: Mapping[str, bytes], names: RecordFields, facts: RecordFields) -> str | None:
    """Return the text of the txt member, else of the json one; the same text in both is read in both."""
    if not names.take("txt"):
        return facts.text(*_CAPTIONS)
    try:
        text = value["txt"].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Skip("caption is no UTF-8", str(error)) from None
    # An empty txt often stands next to a json with the caption.
    if not text.strip() and facts.has(*_CAPTIONS):
        return facts.text(*_CAPTIONS)
    for name in _CAPTIONS:
        if str(facts.value.get(name)).strip() == text.strip():
            facts.take_all(name)
    return text
