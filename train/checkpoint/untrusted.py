"""Reading checkpoints that somebody else may have made: no file can run code, or take more memory than its size shows.

torch's distributed checkpoints keep an index, `.metadata`, as a pickle, and read other entries with torch.load and
weights_only=False. Here torch gets an index that was compared with the files (index.py), and entries are plain data only.
"""

import io
import os
import pickle
import re
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import torch
from torch.distributed import DistError
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException

from visionloom.common.errors import UserError
from visionloom.common.text import one_line
from visionloom.train.checkpoint.index import IndexFault, read_index

LARGEST_PICKLE: Final = 1 << 14
"""Bytes of an entry's pickle, which has no numbers of tensors. Measured: 8 to 150."""
LONGEST: Final = 300
"""Characters of torch's own words for a fault that an error repeats."""
REFUSED: Final = re.compile(
    r"it names .{1,120}?, which no checkpoint needs|Weights only load failed"
)
MACHINE: Final = (OSError, MemoryError, DistError)
"""Errors that are no fault of a checkpoint's files."""


@contextmanager
def harmless_reading(folder: Path) -> Iterator[None]:
    """Let torch's reader of distributed checkpoints take only plain data, and an index that agrees with the files.

    Raises:
        UserError: if the files hold anything else, or torch cannot use them; nothing of it has run.
    """
    indices: dict[Path, Any] = {}
    plain = torch.load

    # In the place of pickle.load in torch's reader; read once for all its calls.
    def load_index(_: object) -> Any:
        indices[folder] = indices.get(folder) or read_index(folder)
        return indices[folder].metadata()

    # torch asks for weights_only=False, which would run any code in the file.
    def load_plain_data(file: Any, *args: Any, **options: Any) -> Any:
        check_entry(file)
        return plain(file, *args, **{**options, "weights_only": True})

    try:
        shim = types.SimpleNamespace(load=load_index, dump=pickle.dump)
        with patch.object(filesystem, "pickle", shim), patch.object(torch, "load", load_plain_data):
            yield
    except (UserError, *MACHINE):
        raise
    # torch's own is no Exception, and holds those of all ranks.
    except (Exception, CheckpointException) as error:
        for cause in _causes(error):
            if isinstance(cause, MACHINE):
                raise cause from error
        raise UserError(
            f"{folder} is not read: {_in_words(error)}: take a checkpoint from a source that you trust"
        ) from error


def check_entry(file: Any) -> None:
    """Refuse an entry that is packed, so that it might be of any size, or whose pickle is large.

    Args:
        file: an archive of torch.save, open or by its path.

    Raises:
        IndexFault: naming what is wrong.
    """
    try:
        members = zipfile.ZipFile(_Part(file) if hasattr(file, "read") else file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise IndexFault(f"an entry is no archive of torch.save ({error})") from error
    finally:
        if hasattr(file, "seek"):  # torch.load reads it next, from its start
            file.seek(0)
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise IndexFault("an entry is packed, as torch.save never does")
        if member.filename.endswith(".pkl") and member.file_size > LARGEST_PICKLE:
            raise IndexFault(f"an entry has {member.file_size} bytes beside its numbers")


class _Part(io.RawIOBase):
    """A view that torch cuts out of a file, with a way back from its end: torch's own seeks the wrong way there."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.place = 0
        file.seek(0, os.SEEK_END)
        self.size: int = file.tell()

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        self.place = max(0, origin + offset)
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, size: int = -1, /) -> bytes:
        left = max(0, self.size - self.place)
        self.file.seek(min(self.place, self.size))
        content: bytes = self.file.read(left if size < 0 else min(size, left))
        self.place += len(content)
        return content


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, those that led to it, and those of other ranks."""
    seen: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is None or each in seen:
            continue
        seen.append(each)
        left += [each.__context__, each.__cause__]
        if isinstance(each, CheckpointException):
            left += [cause for cause, _ in each.failures.values()]
        yield each


def _in_words(error: BaseException) -> str:
    """Describe an error in one line: what was refused, else the first of our own words, else torch's."""
    causes = list(_causes(error))
    for cause in causes:
        if refused := REFUSED.search(str(cause)):
            return one_line(refused[0])
    for cause in causes:
        if isinstance(cause, IndexFault | UserError):
            return one_line(str(cause))[:LONGEST]
    # The last one led to all others.
    return one_line(f"{type(causes[-1]).__name__}: {causes[-1]}")[:LONGEST]
