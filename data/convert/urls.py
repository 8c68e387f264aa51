"""An index of what img2dataset has fetched: from a URL to the bytes of its picture.

img2dataset writes, as tar files (00000.tar) or as folders (00000/), for each picture KEY.jpg and KEY.json with its URL.
The index holds 40 bytes a picture, sorted by a hash of the URL; it is made in buckets, so that memory stays small.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.places import PlaceError, locate, read_located
from visionloom.data.convert.keys import record_json
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source_files import located
from visionloom.data.shards.tar import Fault, members

_COLUMNS: Final = ("high", "low", "file", "offset", "length")
_ROW: Final = np.dtype([(name, "<u8") for name in _COLUMNS])
"""The first two are the hash of the URL; `file` is the number of a name."""
_BUCKETS: Final = 64
_BUFFERED: Final = 20_000
"""Rows kept in memory before they are written out to their buckets."""
_NOT_MEDIA: Final = ("json", "txt")
_LARGEST_JSON: Final = 16 << 20
"""Bytes of a picture's JSON."""

UrlRow = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class UrlIndex:
    """Finds the picture of a URL; `folder` has the index, made by `build_index`."""

    folder: Path
    images: Path

    def read(self, url: str) -> bytes | None:
        """Return the bytes of the picture that was fetched from this URL, None if there is none."""
        rows, names = _load(self.folder)
        high, low = _hash(url)
        place = int(np.searchsorted(rows["high"], np.uint64(high)))
        # Rows are sorted by both halves of the hash; URLs that share the first are next to each other.
        while place < len(rows) and rows["high"][place] == high:
            if rows["low"][place] == low:
                return self._picture(rows[place], names)
            place += 1
        return None

    def _picture(self, row: Any, names: "_Names") -> bytes:
        path = self.images / names.name(int(row["file"]))
        with open(path, "rb") as file:
            return os.pread(file.fileno(), int(row["length"]), int(row["offset"]))


def build_index(images: Path, folder: Path, follow_links: bool = False) -> UrlIndex:
    """Index all pictures below `images` that have a JSON with a URL next to them, unless `folder` has the index.

    Files that lead out of `images` are ignored unless `follow_links`. Raises UserError for a damaged tar.
    """
    done = folder / "rows.bin"
    if not done.exists():
        # Rows are appended: an interrupted index would be there twice.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        writer = _Writer(folder)
        for number, (name, pictures) in enumerate(_sources(images, follow_links)):
            writer.name(name)
            for url, offset, length in pictures:
                writer.row((*_hash(url), number, offset, length))
        writer.finish(done)
    return UrlIndex(folder, images)


def _hash(url: str) -> tuple[int, int]:
    digest = hashlib.sha256(url.encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


_Pictures = Iterator[tuple[str, int, int]]
"""URL, offset and length."""


def _sources(images: Path, follow_links: bool) -> Iterator[tuple[str, _Pictures]]:
    """Yield every file that holds pictures, below `images` in sorted order, and the pictures in it."""
    for folder, folders, files in os.walk(images):
        # os.walk goes into them in the order that they have now.
        folders.sort()
        for file in sorted(files):
            name = str((Path(folder) / file).relative_to(images))
            if file.endswith(".tar"):
                yield name, _in_tar(located(images, name, follow_links))
            elif file.endswith(".json"):
                media = _picture_of(images, name, follow_links)
                if media is not None:
                    yield media, _in_folder(images, name, media, follow_links)


def _picture_of(images: Path, name: str, follow_links: bool) -> str | None:
    """Return the picture with the name of a JSON file; None if there is none that may be read."""
    for suffix in (".jpg", ".png", ".webp", ".jpeg", ".gif"):
        media = str(Path(name).with_suffix(suffix))
        with suppress(PlaceError, OSError):
            locate(images, media, follow_links=follow_links)
            return media
    return None


def _in_folder(images: Path, name: str, media: str, follow_links: bool) -> _Pictures:
    """Yield the picture of a JSON file, if that has its URL."""
    with suppress(PlaceError, FileNotFoundError):
        url = _url_in(read_located(images, name, _LARGEST_JSON, follow_links))
        if url:
            yield url, 0, (images / media).stat().st_size


def _in_tar(path: Path) -> _Pictures:
    """Yield the pictures in a tar, in which the members of a key follow each other; only the JSON members are read."""
    key, url, place = "", "", (0, 0)
    for member, file in members(path, _refuse):
        stem, _, ending = member.name.rpartition(".")
        if stem != key:
            # A picture that could not be fetched has a JSON alone.
            if url and place[1]:
                yield url, *place
            key, url, place = stem, "", (0, 0)
        if ending == "json" and member.length <= _LARGEST_JSON:
            file.seek(member.offset)
            url = _url_in(file.read(member.length))
        elif ending not in _NOT_MEDIA:
            place = member.offset, member.length
    if url and place[1]:
        yield url, *place


def _refuse(fault: Fault) -> None:
    problem = fault.error.removeprefix("damaged: ")
    fix = "fetch it again or remove it"
    raise UserError(f"--images-dir: {fault.file} is damaged: {problem}: {fix}")


def _url_in(document: bytes) -> str:
    """Return the URL in a picture's JSON; empty if there is none."""
    try:
        facts = record_json(document)
    except Skip:
        return ""
    url = facts.get("url") if isinstance(facts, dict) else None
    return url if isinstance(url, str) else ""


class _Writer:
    """Rows go to buckets by the first bits of their hash; each bucket is sorted at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.waiting, self.length = folder, list[UrlRow](), 0

    def name(self, name: str) -> None:
        self.length += len(os.fsencode(name))
        self._append("names.bin", os.fsencode(name))
        self._append("ends.bin", np.uint64(self.length).tobytes())

    def row(self, row: UrlRow) -> None:
        self.waiting.append(row)
        if len(self.waiting) >= _BUFFERED:
            self._spill()

    def _spill(self) -> None:
        rows = np.array(self.waiting, _ROW)
        # By the first bits, so that sorted buckets one after another are sorted.
        buckets = (rows["high"] // np.uint64(2**64 // _BUCKETS)).astype(int)
        for bucket in np.unique(buckets):
            self._append(f"bucket{bucket:02d}", rows[buckets == bucket].tobytes())
        self.waiting = []

    def _append(self, name: str, data: bytes) -> None:
        with open(self.folder / name, "ab") as file:
            file.write(data)

    def finish(self, path: Path) -> None:
        """Sort the buckets one after another into the index at `path`."""
        self._spill()
        # Without any picture the files are there all the same.
        for name in ("names.bin", "ends.bin"):
            self._append(name, b"")
        with replacing(path) as file:
            for bucket in sorted(self.folder.glob("bucket*")):
                rows = np.fromfile(bucket, _ROW)
                file.write(np.sort(rows, order=_COLUMNS[:4]).tobytes())
                bucket.unlink()


class _Names:
    """Names of files, one after another, with the end of each; mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self.text = _map(folder / "names.bin", np.dtype(np.uint8))
        self.ends = _map(folder / "ends.bin", np.dtype("<u8"))

    def name(self, number: int) -> str:
        start = int(self.ends[number - 1]) if number else 0
        return os.fsdecode(bytes(self.text[start : int(self.ends[number])]))


@lru_cache(4)
def _load(folder: Path) -> tuple[NDArray[Any], _Names]:
    """Return rows and names, mapped into memory once a process."""
    return _map(folder / "rows.bin", _ROW), _Names(folder)


def _map(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    # An empty file cannot be mapped.
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)
