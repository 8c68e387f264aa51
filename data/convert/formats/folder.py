"""A folder of pictures or videos with captions: NAME.txt or NAME.caption next to each, or metadata.jsonl.

metadata.jsonl has lines {"file_name": ..., "text" or "caption": ...}, as Hugging Face's imagefolder, and is in the folder.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import batched
from pathlib import Path, PurePath
from typing import Any, ClassVar, Final

from visionloom.common.errors import UserError
from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.formats.captions import fill_caption
from visionloom.data.convert.json_parts import RecordSpan, cut_json, read_json
from visionloom.data.convert.keys import Keys
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft, SourceOptions, SourceRecord
from visionloom.data.convert.source_files import located
from visionloom.data.convert.videos import add_video
from visionloom.data.shards.media_header import kind_of
from visionloom.data.shards.write_parts import SourcePart

METADATA: Final = "metadata.jsonl"
_CAPTIONS: Final = (".txt", ".caption")
LARGEST_CAPTION: Final = 16 << 20
"""Bytes: 16 MiB, more than the longest pack holds."""


LINE: Final = Keys(
    "record", {"file_name": "the picture or video", "text": "its caption", "caption": "its caption"}
)
"""A line of metadata.jsonl."""


@dataclass(frozen=True, slots=True)
class Files:
    """Media files below a folder."""

    folder: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Listed:
    """A media file of the folder; its caption is next to it."""

    name: str


class Folder:
    """One picture or video a sample: a document of it and its caption."""

    keys: ClassVar[tuple[Keys, ...]] = (LINE,)

    def parts(self, path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
        """Yield files in sorted order, or the lines of metadata.jsonl if there is one."""
        if not path.is_dir():
            raise UserError(f"{path}: a folder of pictures expected")
        if METADATA in os.listdir(path):
            return cut_json(located(path, METADATA, follow_links), size)
        groups = batched(_media(path), size)
        return (SourcePart(len(names), Files(str(path), names)) for names in groups)

    def records(self, where: Files | RecordSpan) -> Iterator[SourceRecord]:
        """Yield media files with their captions."""
        if isinstance(where, RecordSpan):
            yield from read_json(where)
            return
        for name in where.names:
            yield SourceRecord(name, Listed(name))

    def convert(self, value: Any, draft: SampleDraft, options: SourceOptions) -> None:
        """Fill the draft with a document of one picture or video and its caption; raises Skip."""
        files = options.files
        if isinstance(value, Listed):
            value = {"file_name": value.name, "text": _caption(value.name, files)}
        if not isinstance(value, dict):
            raise Skip("not an object", f"a JSON object expected, got {type(value).__name__}")

        line = draft.open(LINE, value)
        name, text = line.take("file_name"), line.take("text", "caption")
        if not isinstance(name, str) or not isinstance(text, str):
            places = f"a text beside it ({' or '.join(_CAPTIONS)}) or in {METADATA}"
            raise Skip("no caption", f"{name}: {places} expected")
        # Names are unique below the folder.
        draft.id = name
        if kind_of(name) == "video":
            fill_caption(draft, [add_video(draft, files, name)], text)
        else:
            fill_caption(draft, [draft.image(files.read(name))], text)


def _media(path: Path) -> Iterator[str]:
    """Yield the names of media files below a folder, one folder after another."""
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            if kind_of(name) != "other":
                yield str((Path(folder) / name).relative_to(path))


def _caption(name: str, files: MediaFiles) -> str | None:
    """Return the text next to a file; one that is not UTF-8 is none. Raises Skip for one that may not be read."""
    path = PurePath(name)
    for suffix in _CAPTIONS:
        # a.txt or a.jpg.txt for a.jpg.
        for caption in (path.with_suffix(suffix), path.with_name(path.name + suffix)):
            try:
                return files.read(str(caption), LARGEST_CAPTION).decode("utf-8-sig")
            except UnicodeDecodeError:
                return None
            except Skip as skip:
                if skip.reason != "file not found":
                    raise
    return None
