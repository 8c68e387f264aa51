"""A folder on this machine with the parts of remote files that were read last, shared by all processes."""

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from visionloom.common.atomic import UNFINISHED, replacing
from visionloom.common.errors import UserError

KEPT: Final = 0.9
"""Share of the limit that stays when the oldest parts make room, so that room is made once for many."""
LONGEST_WRITE: Final = 3600
"""Seconds after which an unfinished part has been left by a process that died."""
_log = logging.getLogger(__name__)


class RangeCache:
    """Bytes by name, at most `limit` of them; those not used for longest go first (by the files' times).

    Each part is a file that appears complete or not at all. The bytes in use are counted in the file `used`, locked while it
    changes, so the limit holds over all processes of the machine. Raises UserError if the folder cannot be made.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "used").touch()
        except OSError as error:
            raise UserError(
                f"data.store.cache: {folder} cannot be used: {error.strerror}"
            ) from None
        self._warned = False

    def get(self, name: str, length: int | None = None) -> bytes | None:
        """Return the part of that name, if it is here and has `length` bytes (any number without one)."""
        path = self._path(name)
        try:
            data = path.read_bytes()
            # Its time says when it was used last.
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        return data if length in (None, len(data)) else None

    def put(self, name: str, data: bytes) -> None:
        """Keep a part. A folder that is full or cannot be written costs speed only: it is logged once."""
        # It would push out everything else, and go next.
        if len(data) > self.limit * KEPT:
            return
        path = self._path(name)
        try:
            path.parent.mkdir(exist_ok=True)
            # A cache may be lost in a power cut: no waiting for the disk.
            with replacing(path, durable=False, placing=self._counting(path, len(data))) as file:
                file.write(data)
        except OSError as error:
            self._warn(error)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self.folder / digest[:2] / digest[2:]

    @contextmanager
    def _counting(self, path: Path, size: int) -> Iterator[None]:
        """Make room for a part of `size` bytes, let it be placed, and count it, as one step for all processes."""
        with self._locked() as descriptor:
            # A part of the same name is replaced.
            more = size - _size(path)
            used = int(os.pread(descriptor, 32, 0) or b"0") + more
            if used > self.limit:
                used = self._make_room(size) + size - _size(path)
            yield
            # Always 32 digits: a shorter number would leave digits of the last one.
            os.pwrite(descriptor, b"%032d" % used, 0)

    def _make_room(self, more: int) -> int:
        """Remove the oldest parts; return the bytes that remain, counted anew."""
        parts: list[tuple[int, int, str]] = []
        for entry in self._parts():
            facts = entry.stat()
            parts.append((facts.st_mtime_ns, facts.st_size, entry.path))

        used = sum(size for _, size, _ in parts)
        for _, size, path in sorted(parts):
            if used + more <= self.limit * KEPT:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used

    def _parts(self) -> Iterator[os.DirEntry[str]]:
        """Yield all parts; remove what a process that died left unfinished."""
        for folder in filter(os.DirEntry.is_dir, os.scandir(self.folder)):
            for entry in os.scandir(folder):
                if not entry.name.endswith(UNFINISHED):
                    yield entry
                    continue
                # It may be finished, and so renamed, just now.
                with suppress(FileNotFoundError):
                    if entry.stat().st_mtime < time.time() - LONGEST_WRITE:
                        os.unlink(entry)

    @contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            message = "data.store.cache: %s cannot be used, reading goes on without it: %s"
            _log.warning(message, self.folder, error.strerror)


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
