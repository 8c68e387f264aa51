"""Pictures and videos of a source: files below given folders, or URLs that img2dataset has fetched before.

Nothing is fetched here, and no reference leaves the folders: the names in a downloaded JSON are not trusted.
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
    """True if a link may lead outside the folders."""

    def read(self, ref: object, largest: int = LARGEST_MEMBER) -> bytes:
        """Return the bytes of a file, a fetched URL or an inline `data:` picture, at most `largest` of a file; raises Skip.

        `ref` is its name, or an object with it ({"path"}, {"url"}), or the bytes themselves ({"bytes"}).
        """
        ref = reference(ref)
        if isinstance(ref, bytes):
            return ref
        data = self._without_file(ref) if isinstance(ref, str) else None
        if data is not None:
            return data

        path = self.locate(ref)
        if path.is_dir():
            raise Skip("a folder, not a file", str(ref))
        size = path.stat().st_size
        if size > largest:
            raise Skip("file too large", f"{ref}: {size} bytes, at most {largest}")
        return path.read_bytes()

    def _without_file(self, ref: str) -> bytes | None:
        """Return the bytes of an inline picture or a fetched URL; None for the name of a file."""
        inline = _INLINE.match(ref)
        if inline:
            return from_base64(ref[inline.end() :])
        if _BARE.fullmatch(ref.rstrip()):
            return from_base64(ref)
        if ref.lower().startswith(("http://", "https://")):
            return self._fetched(ref)
        return None

    def locate(self, ref: object) -> Path:
        """Return the path of the file or folder that a reference means; raises Skip if there is none or it leads outside."""
        # A zero would end the name for the system.
        if not isinstance(ref, str) or not ref or "\0" in ref:
            raise Skip("not a file name", repr(ref)[:80])
        scheme = _SCHEME.match(ref)
        if scheme:
            raise Skip(f"refused reference {scheme[1]}:", ref[:200])

        refused: list[PlaceError] = []
        for root in self.roots:
            try:
                return locate(root, ref, "either", self.follow_links, self.roots)
            except PlaceError as error:
                refused.append(error)
                # An absolute name may be that of a file in another of the folders.
                if str(error) != OUTSIDE:
                    break
            except (FileNotFoundError, NotADirectoryError):
                continue

        # One folder lacks the file and another refuses its name as outside: it is not there.
        if not refused or (len(refused) < len(self.roots) and str(refused[-1]) == OUTSIDE):
            raise Skip("file not found", ref[:200])
        raise _refusal(refused[-1], ref)

    def holds(self, name: str) -> bool:
        """Return whether --images-dir, or else the source's folder, has a file of this name that may be read."""
        try:
            return self._in_first_root(name).is_file()
        except (PlaceError, OSError):
            return False

    def _in_first_root(self, name: str) -> Path:
        return locate(self.roots[0], name, "file", self.follow_links, self.roots)

    def _fetched(self, url: str) -> bytes:
        """Return the bytes that were fetched from a URL: by the index, else by the names that its file may have."""
        data = None if self.index is None else self.index.read(url)
        if data is not None:
            return data
        for name in _names_of(url):
            try:
                return self._in_first_root(name).read_bytes()
            except PlaceError as error:
                raise _refusal(error, name) from None
            except (FileNotFoundError, NotADirectoryError):
                continue
        raise Skip("URL not in --images-dir", url[:200])


def _refusal(error: PlaceError, ref: str) -> Skip:
    """Return the Skip of a reference that is not followed, with the way to allow it."""
    ref = ref[:200]
    match str(error):
        case places.DOTS:
            return Skip("refused reference with ..", ref)
        case places.OUTSIDE:
            fix = "--images-dir names another folder"
            return Skip("refused path outside the source's folders", f"{ref}: {fix}")
        case places.LINK:
            fix = "--follow-links allows it"
            return Skip("refused link out of the source's folders", f"{ref}: {fix}")
        case "is a link to nothing":
            return Skip("file not found", f"{ref} is a link to nothing")
    return Skip("not a file", f"{ref} {error}")


def _names_of(url: str) -> Iterator[str]:
    """Yield the names that a fetched URL's file may have: the SHA-256 of the URL with any ending, then the name in its path."""
    digest = hashlib.sha256(url.encode()).hexdigest()
    yield from (digest + suffix for suffix in _PICTURE_SUFFIXES)
    # A URL's last name may not be unique: the hash comes first.
    name = PurePosixPath(unquote(urlsplit(url).path)).name
    if name and "\0" not in name and name != "..":
        yield name


def reference(ref: object) -> object:
    """Return the reference in an object, {"bytes"}, {"path"}, {"url"}, {"base64"} or {"data"}; anything else is its own."""
    if not isinstance(ref, Mapping):
        return ref
    for name in IN_OBJECT:
        if ref.get(name) not in (None, "", b""):
            return _value(name, ref[name])
    return None


def named(fields: RecordFields, *names: str) -> object:
    """Return the reference under the first of these keys: a file's name, an object, or the bytes; None if there is none."""
    for name in names:
        if fields.value.get(name) not in (None, "", b""):
            # Next to the bytes it names the file that they came from.
            fields.take("path")
            return _value(name, fields.take(name))
    return None


def _value(name: str, value: object) -> object:
    return from_base64(value) if name in ("base64", "data") else value


def from_base64(data: object) -> bytes:
    """Decode a base64 text, wrapped or not, with `-_` or `+/`; raises Skip."""
    if not isinstance(data, str):
        raise Skip("broken inline data", f"a text expected, got {type(data).__name__}")
    text = "".join(data.split()).rstrip("=")
    text = text.translate(str.maketrans("-_", "+/"))
    padding = "=" * (-len(text) % 4)
    try:
        return base64.b64decode(text + padding, validate=True)
    except ValueError as error:
        raise Skip("broken inline data", str(error)) from None
