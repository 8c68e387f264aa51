"""Where a source's pictures and videos lie: files below given folders, or URLs that img2dataset has fetched before.

Nothing is fetched here, and no reference leaves the folders: what a downloaded JSON names is not trusted.
"""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit

from visionloom.common import places
from visionloom.common.places import OUTSIDE, PlaceError, locate
from visionloom.data.convert.keys import RecordFields
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.urls import UrlIndex
from visionloom.data.shards.tar import LARGEST_MEMBER

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_INLINE: Final = re.compile(r"data:[^,]{0,100};base64,", re.IGNORECASE)
"""RFC 2397; Qwen's documentation has it without a subtype (`data:image;base64,`)."""
_BARE: Final = re.compile(r"(/9j/|iVBORw0KGgo|R0lGOD|UklGR)[A-Za-z0-9+/\s]{60,}={0,2}")
"""base64 of a JPEG, PNG, GIF or WEBP without anything before it."""
IN_OBJECT: Final = ("bytes", "path", "url", "base64", "data")
"""Keys of an object in place of a reference, the first that has a value wins."""
_PICTURE_SUFFIXES: Final = ("", ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class MediaFiles:
    """Reads references of a source, never from outside `roots`."""

    roots: tuple[Path, ...]
    """Folders, the first that has a file wins: that of --images-dir, then the source's own."""
    index: UrlIndex | None = None
    """Finds URLs in img2dataset's output."""
    follow_links: bool = False
    """Whether a link may lead outside the folders."""

    def read(self, ref: object, largest: int = LARGEST_MEMBER) -> bytes:
        """Bytes of a file, a fetched URL or an inline `data:` picture, at most `largest` of a file; raises Skip.

        `ref` is its name, or an object with it ({"path"}, {"url"}), or the bytes themselves ({"bytes"}).
        """
        ref = reference(ref)
        if isinstance(ref, bytes):
            return ref
        if isinstance(ref, str) and (inline := _INLINE.match(ref)):
            return from_base64(ref[inline.end() :])
        if isinstance(ref, str) and _BARE.fullmatch(ref.rstrip()):
            return from_base64(ref)
        if isinstance(ref, str) and ref.lower().startswith(("http://", "https://")):
            return self._fetched(ref)
        path = self.locate(ref)
        if path.is_dir():
            raise Skip("a folder, not a file", str(ref))
        if path.stat().st_size > largest:
            raise Skip("file too large", f"{ref}: {path.stat().st_size} bytes, at most {largest}")
        return path.read_bytes()

    def locate(self, ref: object) -> Path:
        """The file or folder that a reference means; raises Skip if there is none or it leads outside."""
        if not isinstance(ref, str) or not ref or "\0" in ref:
            raise Skip("not a file name", repr(ref)[:80])
        if scheme := _SCHEME.match(ref):
            raise Skip(f"refused reference {scheme[1]}:", ref[:200])
        refused: list[PlaceError] = []
        for root in self.roots:
            try:
                return locate(root, ref, "either", self.follow_links, self.roots)
            except PlaceError as error:
                refused.append(error)
                if str(error) != OUTSIDE:  # an absolute name of a file in another of the folders
                    break
            except (FileNotFoundError, NotADirectoryError):
                continue
        if not refused or (len(refused) < len(self.roots) and str(refused[-1]) == OUTSIDE):
            raise Skip("file not found", ref[:200])
        raise _refusal(refused[-1], ref)

    def holds(self, name: str) -> bool:
        """Whether --images-dir, or else the source's folder, has a file of this name that may be read."""
        try:
            return locate(self.roots[0], name, "file", self.follow_links, self.roots).is_file()
        except (PlaceError, OSError):
            return False

    def _fetched(self, url: str) -> bytes:
        if self.index is not None and (data := self.index.read(url)) is not None:
            return data
        for name in _names_of(url):
            try:
                return locate(
                    self.roots[0], name, "file", self.follow_links, self.roots
                ).read_bytes()
            except PlaceError as error:
                raise _refusal(error, name) from None
            except (FileNotFoundError, NotADirectoryError):
                continue
        raise Skip("URL not in --images-dir", url[:200])


def _refusal(error: PlaceError, ref: str) -> Skip:
    """Why a reference is not followed, and what may be done about it."""
    match str(error):
        case places.DOTS:
            return Skip("refused reference with ..", ref[:200])
        case places.OUTSIDE:
            return Skip(
                "refused path outside the source's folders",
                f"{ref[:200]}: --images-dir names another folder",
            )
        case places.LINK:
            return Skip(
                "refused link out of the source's folders", f"{ref[:200]}: --follow-links allows it"
            )
        case "is a link to nothing":
            return Skip("file not found", f"{ref[:200]} is a link to nothing")
    return Skip("not a file", f"{ref[:200]} {error}")


def _names_of(url: str) -> Iterator[str]:
    """Names that a fetched URL's file may have: the SHA-256 of the URL with any ending, else the name in its path."""
    digest = hashlib.sha256(url.encode()).hexdigest()
    yield from (digest + suffix for suffix in _PICTURE_SUFFIXES)
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if name and "\0" not in name and name != "..":
        yield name


def reference(ref: object) -> object:
    """What an object names, {"bytes"}, {"path"}, {"url"}, {"base64"} or {"data"}; anything else is its own reference."""
    if not isinstance(ref, Mapping):
        return ref
    return next(
        (_value(name, ref[name]) for name in IN_OBJECT if ref.get(name) not in (None, "", b"")),
        None,
    )


def named(fields: RecordFields, *names: str) -> object:
    """The reference under the first of these keys: a file's name, an object, or the bytes; None if there is none."""
    for name in names:
        if fields.value.get(name) not in (None, "", b""):
            fields.take("path")  # beside the bytes it is where they came from
            return _value(name, fields.take(name))
    return None


def _value(name: str, value: object) -> object:
    return from_base64(value) if name in ("base64", "data") else value


def from_base64(data: object) -> bytes:
    """The bytes of a base64 text, wrapped or not, with `-_` or `+/`; raises Skip."""
    if not isinstance(data, str):
        raise Skip("broken inline data", f"a text expected, got {type(data).__name__}")
    text = "".join(data.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise Skip("broken inline data", str(error)) from None
