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

_ROW: Final = np.dtype(
    [("high", "<u8"), ("low", "<u8"), ("file", "<u8"), ("offset", "<u8"), ("length", "<u8")]
)
_BUCKETS: Final = 64
_BUFFERED: Final = 20_000
"""Rows kept in memory before they are written out to their buckets."""
_NOT_MEDIA: Final = ("json", "txt")
_LARGEST_JSON: Final = 16 << 20
"""Bytes of the JSON beside a picture."""

UrlRow = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class UrlIndex:
    """Finds the picture of a URL; `folder` has the index, made by `build_index`."""

    folder: Path
    images: Path

    def read(self, url: str) -> bytes | None:
        """Bytes of the picture that was fetched from this URL, None if there is none."""
        rows, names = _load(self.folder)
        high, low = _hash(url)
        place = int(np.searchsorted(rows["high"], np.uint64(high)))
        while place < len(rows) and rows["high"][place] == high and rows["low"][place] != low:
            place += 1
        if place == len(rows) or rows["high"][place] != high:
            return None
        row = rows[place]
        start, end = (int(value) for value in _name_span(names, int(row["file"])))
        path = self.images / os.fsdecode(bytes(names["text"][start:end]))
        with open(path, "rb") as file:
            return os.pread(file.fileno(), int(row["length"]), int(row["offset"]))


def build_index(images: Path, folder: Path, follow_links: bool = False) -> UrlIndex:
    """Index all pictures below `images` that have a JSON with a URL beside them, unless `folder` has the index.

    Files that lead out of `images` are passed over unless `follow_links`. Raises UserError for a damaged tar.
    """
    done = folder / "rows.bin"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        writer = _Writer(folder)
        for number, (name, found) in enumerate(_sources(images, follow_links)):
            writer.name(name)
            for url, offset, length in found:
                writer.row((*_hash(url), number, offset, length))
        writer.finish(done)
    return UrlIndex(folder, images)


def _hash(url: str) -> tuple[int, int]:
    digest = hashlib.sha256(url.encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


Found = Iterator[tuple[str, int, int]]
"""URL, offset and length."""


def _sources(images: Path, follow_links: bool) -> Iterator[tuple[str, Found]]:
    """Every file that holds pictures, below `images` in sorted order, and what it holds."""
    for folder, folders, files in os.walk(images):
        folders.sort()
        for file in sorted(files):
            name = str((Path(folder) / file).relative_to(images))
            if file.endswith(".tar"):
                yield name, _in_tar(located(images, name, follow_links))
            elif (
                file.endswith(".json")
                and (media := _beside(images, name, follow_links)) is not None
            ):
                yield media, _in_folder(images, name, media, follow_links)


def _beside(images: Path, name: str, follow_links: bool) -> str | None:
    """The picture with the name of a JSON file; None if there is none that may be read."""
    for suffix in (".jpg", ".png", ".webp", ".jpeg", ".gif"):
        media = str(Path(name).with_suffix(suffix))
        with suppress(PlaceError, OSError):
            locate(images, media, follow_links=follow_links)
            return media
    return None


def _in_folder(images: Path, name: str, media: str, follow_links: bool) -> Found:
    """The picture beside a JSON file, if that has its URL."""
    with suppress(PlaceError, FileNotFoundError):
        url = _url_in(read_located(images, name, _LARGEST_JSON, follow_links))
        if url:
            yield url, 0, (images / media).stat().st_size


def _in_tar(path: Path) -> Found:
    """Pictures in a tar, in which the members of a key lie together; only the JSON members are read."""
    key, url, place = "", "", (0, 0)
    for member, file in members(path, _refuse):
        this, _, ending = member.name.rpartition(".")
        if this != key:
            if url and place[1]:
                yield url, *place
            key, url, place = this, "", (0, 0)
        if ending == "json" and member.length <= _LARGEST_JSON:
            file.seek(member.offset)
            url = _url_in(file.read(member.length))
        elif ending not in _NOT_MEDIA:
            place = member.offset, member.length
    if url and place[1]:
        yield url, *place


def _refuse(fault: Fault) -> None:
    raise UserError(
        f"--images-dir: {fault.file} is damaged: {fault.error.removeprefix('damaged: ')}: fetch it again or remove it"
    )


def _url_in(document: bytes) -> str:
    try:
        found = record_json(document)
    except Skip:
        return ""
    url = found.get("url") if isinstance(found, dict) else None
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
        buckets = (rows["high"] // np.uint64(2**64 // _BUCKETS)).astype(int)
        for bucket in np.unique(buckets):
            self._append(f"bucket{bucket:02d}", rows[buckets == bucket].tobytes())
        self.waiting = []

    def _append(self, name: str, data: bytes) -> None:
        with open(self.folder / name, "ab") as file:
            file.write(data)

    def finish(self, path: Path) -> None:
        self._spill()
        for name in ("names.bin", "ends.bin"):
            self._append(name, b"")
        with replacing(path) as file:
            for bucket in sorted(self.folder.glob("bucket*")):
                file.write(
                    np.sort(
                        np.fromfile(bucket, _ROW), order=("high", "low", "file", "offset")
                    ).tobytes()
                )
                bucket.unlink()


@lru_cache(4)
def _load(folder: Path) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Rows and names, mapped into memory once a process."""
    return _map(folder / "rows.bin", _ROW), {
        "text": _map(folder / "names.bin", np.dtype(np.uint8)),
        "ends": _map(folder / "ends.bin", np.dtype("<u8")),
    }


def _map(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)


def _name_span(names: dict[str, NDArray[Any]], number: int) -> tuple[int, int]:
    ends = names["ends"]
    return int(ends[number - 1]) if number else 0, int(ends[number])
