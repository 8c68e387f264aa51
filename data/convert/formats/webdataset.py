"""WebDataset tars made elsewhere: a picture or video with a caption (txt, or json with one), or samples of our schema."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Final

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
        """A member's bytes; raises Skip if the sample has none of this name."""
        data = (self.members or {}).get(ref) if isinstance(ref, str) else None
        if data is None:
            raise Skip("no such member", repr(ref)[:80])
        return data

    def locate(self, ref: object) -> Path:
        """Members are no folders."""
        return Path(str(ref))


class WebDataset:
    """One key a sample; a damaged place in a tar is a record left out, and what follows it is read."""

    keys: ClassVar[tuple[Keys, ...]] = (MEMBERS, DOCUMENT, SAMPLE, MESSAGE, *ELEMENT.values())

    def parts(self, path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
        """One tar each."""
        return (
            SourcePart(_count(tar), Tar(str(tar)))
            for tar in files_below(path, (".tar",), follow_links)
        )

    def records(self, where: Tar) -> Iterator[SourceRecord]:
        """One key after another, its members in memory."""
        path, faults = Path(where.path), list[Fault]()
        for key, found in groupby(
            entries(path, faults.append), key=lambda entry: _split(entry.name)[0]
        ):
            value = {_split(entry.name)[1]: entry.data for entry in found}
            yield from (
                SourceRecord(f"{path.name}:{fault.offset}", Skip("damaged tar", str(fault)))
                for fault in faults
            )
            faults.clear()
            yield SourceRecord(f"{path.name}:{key}", value)
        yield from (
            SourceRecord(f"{path.name}:{fault.offset}", Skip("damaged tar", str(fault)))
            for fault in faults
        )

    def convert(
        self, value: Mapping[str, bytes], draft: SampleDraft, options: SourceOptions
    ) -> None:
        """A document of the pictures and videos and their caption, or what our schema says."""
        document = _document(value)
        files = _Members((), members=value)
        if "v" in document and "kind" in document:
            fill_from_schema(document, draft, SourceOptions(files))
            return
        members = draft.open(MEMBERS, {name: name for name in value})
        names = [name for name in sorted(value) if kind_of(name) != "other"]
        members.take_all("json", *names)
        facts = draft.open(DOCUMENT, document)
        text = _caption(value, members, facts)
        if not names:
            raise Skip("no picture or video", f"members {', '.join(value)}")
        if text is None:
            raise Skip(
                "no caption",
                f"members {', '.join(value)}: txt, or json with one of {', '.join(_CAPTIONS)} expected",
            )
        draft.meta.update({name: found for name in ("url", "key") if (found := facts.text(name))})
        media = [
            add_video(draft, files, name) if kind_of(name) == "video" else draft.image(value[name])
            for name in names
        ]
        fill_caption(draft, media, text)


def _split(name: str) -> tuple[str, str]:
    """Key and ending: WebDataset ends the key at the first dot behind the last slash."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return folder + slash + key, ending.lower() if ending.lower() in ("json", "txt") else ending


def _count(path: Path) -> int:
    """Samples in a tar, up to the first damage: for progress and limits."""
    count, last = 0, ""
    with suppress(UserError):
        for member, _ in members(path):
            key = _split(member.name)[0]
            count, last = count + (key != last), key
    return count


def _document(value: Mapping[str, bytes]) -> Mapping[str, Any]:
    if "json" not in value:
        return {}
    found = record_json(value["json"])
    return without_nulls(found) if isinstance(found, dict) else {}


def _caption(value: Mapping[str, bytes], names: RecordFields, facts: RecordFields) -> str | None:
    """The text of the txt member, else of the json one; the same text in both is read in both."""
    if not names.take("txt"):
        return facts.text(*_CAPTIONS)
    try:
        text = value["txt"].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Skip("caption is no UTF-8", str(error)) from None
    if not text.strip() and facts.has(*_CAPTIONS):
        return facts.text(*_CAPTIONS)
    facts.take_all(
        *(name for name in _CAPTIONS if str(facts.value.get(name)).strip() == text.strip())
    )
    return text
