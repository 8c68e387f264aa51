"""The members of a tar by their headers alone: the media in between are passed over, not read."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_BLOCK: Final = 512


def members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files of a tar, each with the open archive; raises tarfile.ReadError for one that is damaged.

    Python's tarfile takes a damaged header for the end, so the end is checked to be one.
    """
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isreg():
                yield tar, member
            tar.members = []  # type: ignore[attr-defined]  # else all of them stay in memory
        with open(path, "rb") as file:
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError(f"no valid member header at byte {tar.offset}")
