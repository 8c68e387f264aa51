"""Tar archives read from start to end: every regular file with its place, and every damage as an error with its offset.

Python's tarfile takes a damaged header for the end of the archive, and so would lose samples in silence; here anything but
a good header or the two zero blocks of the end is a fault.
"""

import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from visionloom.common.errors import UserError

BLOCK: Final = 512
LARGEST_MEMBER: Final = 2**31 - 4096
"""Bytes that one positional read of Linux returns at most."""
LARGEST_NAME: Final = 1 << 20
"""Bytes of a member that holds the next one's name: 1 MiB, as the longest path of Linux has 4 KiB."""
_SCANNED: Final = 1 << 20
"""Bytes read at once in search of the next header after a damaged one."""
_FOREIGN: Final = {
    b"<": "an HTML or XML page",
    b"\x1f\x8b": "compressed by gzip: unpack it",
    b"PK": "a zip archive",
}


@dataclass(frozen=True, slots=True)
class Member:
    """The place of a regular file inside a tar: its bytes begin at `offset`."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One regular file inside a tar, whose bytes begin at `offset`."""

    name: str
    offset: int
    length: int
    crc32: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault and its place: byte offset in the file, and the member or sample key if known."""

    file: str
    offset: int
    key: str
    error: str

    def __str__(self) -> str:
        place = f"at byte {self.offset}"
        if place in self.error:
            return f"{self.file}: {self.error}"
        return f"{self.file}: {place}: {self.error}"


FaultHandler = Callable[[Fault], None]
"""Takes a fault; raises, or returns so that reading continues after it."""


def refuse(fault: Fault) -> None:
    """End at the first fault: raise UserError with its one line."""
    raise UserError(str(fault))


def entries(path: Path, report: FaultHandler = refuse) -> Iterator[Entry]:
    """Yield the regular files of a tar in order, each read once.

    Faults go to `report`; if it returns, reading continues with the next good header. Links, devices and the like are
    faults; folders are ignored.
    """
    with open(path, "rb") as file:
        for member in _members(path, file, report):
            # One read each; a member of 2 GiB is in memory once.
            file.seek(member.offset)
            data = file.read(member.length)
            yield Entry(member.name, member.offset, member.length, zlib.crc32(data), data)


def members(path: Path, report: FaultHandler = refuse) -> Iterator[tuple[Member, BinaryIO]]:
    """Yield the regular files of a tar by their headers alone, each with the open archive; faults as in `entries`."""
    with open(path, "rb") as file:
        for member in _members(path, file, report):
            yield member, file


def _members(path: Path, file: BinaryIO, report: FaultHandler) -> Iterator[Member]:
    size = os.fstat(file.fileno()).st_size
    if not size:
        report(Fault(str(path), 0, "", "is empty (0 bytes): remove it or make it again"))
        return
    yield from _Hop(path, file, size, report).run()


class _Hop:
    """Reads a tar from header to header."""

    def __init__(self, path: Path, file: BinaryIO, size: int, report: FaultHandler) -> None:
        self.path, self.file, self.size, self.report = path, file, size, report
        self.place, self.long_name, self.ended = 0, "", False

    def fault(self, offset: int, error: str, key: str = "") -> None:
        self.report(Fault(str(self.path), offset, key, error))

    def run(self) -> Iterator[Member]:
        while not self.ended:
            offset = self.place
            self.file.seek(offset)
            header = self.file.read(BLOCK)
            self.place += BLOCK
            # Two zero blocks are the end; one alone is damage.
            if header == bytes(BLOCK):
                if self._ends(offset):
                    return None
                continue
            if len(header) < BLOCK:
                end = offset + len(header)
                problem = f"truncated at byte {end}: the end of the archive is missing"
                return self.fault(end, problem)
            if not is_header(header):
                self.fault(offset, self._problem(header, offset))
                if not self._find_header(offset + BLOCK):
                    return None
                continue
            yield from self._member(header, offset)
        return None

    def _member(self, header: bytes, offset: int) -> Iterator[Member]:
        """Yield the member of the header at `offset` if it is a regular file, and move past its bytes."""
        kind, name, length = _parse(header)
        start = offset + BLOCK
        if kind in b"0\0":
            name = (self.long_name or name).removeprefix("./")
        if start + length > self.size:
            self.ended = True
            problem = f"member {name!r} at byte {offset} needs {length} bytes"
            return self.fault(offset, f"truncated: {problem}", name)

        # Members are padded to whole blocks.
        self.place = start + length + -length % BLOCK
        # x and L hold the name of the next member: pax and GNU.
        most = LARGEST_NAME if kind in b"xL" else LARGEST_MEMBER
        if length > most:
            problem = f"member {name!r} has {length} bytes, at most {most} are allowed"
            return self.fault(offset, problem, name)

        if kind in b"xL":
            self.long_name = _long_name(kind, self.file.read(length)) or self.long_name
        elif kind in b"0\0":
            self.long_name = ""
            yield Member(name, start, length)
        # 5 is a folder, g a global pax header.
        elif kind not in b"5g":
            shown = kind.decode(errors="replace")
            problem = f"member {name!r} is not a regular file (tar type {shown!r})"
            self.fault(offset, problem, name)
        return None

    def _problem(self, header: bytes, offset: int) -> str:
        """Return the fault of a block that is no header, as a sentence."""
        for start, kind in _FOREIGN.items():
            if offset == 0 and header.startswith(start):
                return f"is not a tar file but {kind}"
        return f"damaged: no valid member header at byte {offset}"

    def _ends(self, offset: int) -> bool:
        """Return whether the zero block at `offset` is the end; report an archive that stops or continues after it."""
        rest = self.file.read(BLOCK)
        if len(rest) < BLOCK:
            end = offset + BLOCK
            problem = f"truncated at byte {end}: the end of the archive is incomplete"
            self.fault(end, problem)
            return True

        # Writers pad with any number of zeros.
        while rest:
            if rest.count(0) != len(rest):
                problem = f"damaged: a zero block at byte {offset} with more data after it"
                self.fault(offset, problem)
                return not self._find_header(offset + BLOCK)
            rest = self.file.read(_SCANNED)
        return True

    def _find_header(self, offset: int) -> bool:
        """Move to the next block that is a good header, if there is one."""
        while True:
            self.file.seek(offset)
            blocks = self.file.read(_SCANNED)
            for start in range(0, len(blocks) - BLOCK + 1, BLOCK):
                # Headers begin at whole blocks only.
                if is_header(blocks[start : start + BLOCK]):
                    self.place = offset + start
                    return True
            if len(blocks) < _SCANNED:
                return False
            offset += _SCANNED


def is_header(block: bytes) -> bool:
    """Return whether a block of 512 bytes is a member's header, by its checksum (POSIX.1-1988 ustar)."""
    stored = block[148:156].strip(b" \0")
    if re.fullmatch(rb"[0-7]+", stored) is None:
        return False
    # The checksum counts its own eight bytes as spaces.
    counted = sum(block) - sum(block[148:156]) + 8 * 32
    if int(stored, 8) != counted:
        return False
    size = block[124:136]
    return size[0] == 0x80 or re.fullmatch(rb" *[0-7]*[ \0]*", size) is not None


def _parse(header: bytes) -> tuple[bytes, str, int]:
    """Return type, name and length of a member (sizes also in GNU base-256)."""
    name, prefix = _text(header[:100]), header[345:500]
    magic = header[257:265]
    # "ustar  " is GNU's own format, which keeps other things in the place of the prefix.
    has_prefix = magic.startswith(b"ustar") and magic != b"ustar  \0"
    if has_prefix and prefix.strip(b"\0"):
        name = _text(prefix) + "/" + name

    kind, size = header[156:157], header[124:136]
    if size[0] == 0x80:
        return kind, name, int.from_bytes(size[1:])
    return kind, name, int(size.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    """Return a field's text up to its first zero."""
    return field.split(b"\0")[0].decode(errors="replace")


def _long_name(kind: bytes, data: bytes) -> str:
    """Return the name in a GNU long-name member or a pax header; empty if it has none."""
    if kind == b"L":
        return data.rstrip(b"\0").decode(errors="replace")

    place = 0
    # Each pax record is "LENGTH KEY=VALUE\n", its length counted with its own digits.
    while (space := data.find(b" ", place, place + 12)) > 0:
        digits = data[place:space]
        if not digits.isdigit():
            break
        end = place + int(digits)
        key, _, value = data[space + 1 : end - 1].partition(b"=")
        if key == b"path":
            return value.decode(errors="replace")
        # A length that ends before its own record would never come to an end.
        if end <= space:
            break
        place = end
    return ""
