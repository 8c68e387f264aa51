"""Where the bytes of shards come from: the interface of a store, and the store of a local folder.

A local shard that vanished or shrank costs its samples (MissingBytes). A remote store that does not answer is no sample's
fault: after retries StoreError stops the run.
"""

import os
import threading
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from visionloom.common.places import PlaceError, locate, read_located

OPEN_FILES: Final = 128
"""Shards kept open at once by a process: far below the usual limit of 1,024 file descriptors."""
ADVICE: Final = hasattr(os, "posix_fadvise")
"""True where the system takes advice on reads; macOS does not."""
LARGEST_WHOLE: Final = 1 << 30
"""Bytes of a file that is read whole: 1 GiB, a dataset.json of two million shards."""
MEND: Final = "put the file itself there, or give the folder that it leads to"
"""What to do about a shard that is a link out of its folder, or no file."""


class StoreError(OSError):
    """A store cannot be read: the message names the store, the file and what was tried. It stops the run."""


class MissingBytes(Exception):
    """A local shard vanished, shrank or has an unreadable spot since it was opened: its samples are lost, no others."""


class Store(Protocol):
    """A folder of shards. Safe in threads; made anew after fork and in other processes."""

    remote: bool
    """True where reads take a network round trip: then many should be under way at a time."""

    def read(self, file: str, offset: int, length: int, fresh: bool = False) -> bytes:
        """Return exactly `length` bytes of a file; `fresh` ones do not come from a cache.

        Raises StoreError, MissingBytes.
        """
        ...

    def whole(self, file: str, fresh: bool = True) -> bytes:
        """Return a small file, `fresh` or perhaps from a cache. Raises FileNotFoundError, StoreError."""
        ...

    def will_read(self, file: str, offset: int, length: int) -> None:
        """Announce that bytes will be read soon; costs next to nothing and may do nothing."""
        ...


class _File:
    """An open file descriptor, closed with its last reference: a reader keeps it alive while another evicts it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if ADVICE:
            # The kernel would read ahead of every random read.
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class LocalStore:
    """A folder of this machine or of a network file system, read by position; files stay open."""

    remote = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, file: str, offset: int, length: int, fresh: bool = False) -> bytes:
        """See Store; raises MissingBytes if the file is gone or too short, StoreError if its folder is."""
        try:
            data = os.pread(self._open(file).descriptor, length, offset)
        except FileNotFoundError:
            raise self._gone(file) from None
        except OSError as error:
            # A bad spot of the disk, or a handle of a network file system that went stale: opening
            # the file again, once, tells which.
            with self._lock:
                self._files.pop(file, None)
            if fresh:
                raise MissingBytes(f"{file} cannot be read: {error.strerror}") from error
            return self.read(file, offset, length, fresh=True)

        if len(data) != length:
            place = f"{len(data)} of {length} bytes at byte {offset}"
            raise MissingBytes(f"{file} was cut short: {place}")
        return data

    def _gone(self, file: str) -> StoreError | MissingBytes:
        """Return the error for a file that is not there: without its folder, nothing can be read."""
        if self.folder.is_dir():
            return MissingBytes(f"{file} is gone")
        problem = "the file system was unmounted, or the folder was removed"
        return StoreError(f"{self.folder} is gone: {problem}")

    def whole(self, file: str, fresh: bool = True) -> bytes:
        """See Store."""
        try:
            return read_located(self.folder, file, LARGEST_WHOLE)
        except PlaceError as error:
            raise StoreError(f"{self.folder / file} {error}: {MEND}") from None

    def place(self, file: str) -> Path:
        """Return the path of a file of the folder.

        Raises FileNotFoundError, and StoreError for what is no file of the folder.
        """
        try:
            return locate(self.folder, file)
        except PlaceError as error:
            raise StoreError(f"{self.folder / file} {error}: {MEND}") from None

    def will_read(self, file: str, offset: int, length: int) -> None:
        """See Store: the kernel begins to read."""
        if not ADVICE:
            return
        # A fault shows itself at the read.
        with suppress(OSError):
            descriptor = self._open(file).descriptor
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def _open(self, name: str) -> _File:
        with self._lock:
            # A lock costs less than opening a file twice.
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = _File(self.place(name))
                # The oldest is closed once no read holds it any more.
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(name)
        return file
