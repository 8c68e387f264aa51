"""From a name that a file holds to a file on disk: one way for all that strangers write.

Lists of shards, states of checkpoints, references of records and the names in a Hugging Face folder all name files. What they
name must lie in their own folder, also where links lead, and be a regular file: a pipe would let the reader wait for ever.
"""

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

PlaceKind = Literal["file", "folder", "either"]
HUB_FOLDERS: Final = ("models--", "datasets--", "spaces--")
"""Prefixes of repositories in the Hugging Face hub's cache; their snapshots are links to the blobs next to them."""


LONGEST: Final = 3000
"""Characters of a name; Linux takes 4,095 bytes of a whole path."""
DOTS: Final = "leads out of its folder with .."
OUTSIDE: Final = "leads out of its folder"
LINK: Final = "is a link out of its folder"
"""Text of PlaceError for names that lead outside."""


class PlaceError(ValueError):
    """A name leads to no file that may be read: the message says why, without the name."""


def locate(
    folder: Path,
    reference: str,
    kind: PlaceKind = "file",
    follow_links: bool = False,
    others: Sequence[Path] = (),
) -> Path:
    """Return the file or folder that a name in the files of `folder` means.

    Args:
        folder: the folder that the name is relative to and may not lead out of; may itself be reached by links.
        reference: the name, as it stands in the file.
        kind: file, folder, or either.
        follow_links: links may lead outside, which only the user may allow.
        others: more folders that links may lead to.

    Returns:
        the path below `folder`, links in it not replaced.

    Raises:
        PlaceError: if the name leads outside, itself or by a link, or to something of another kind.
        FileNotFoundError: if nothing is there.
        OSError: if the place cannot be looked at.
    """
    _check_name(reference)
    if kind != "folder" and "/" not in reference and _is_regular(f"{folder}/{reference}"):
        # In the folder itself and no link: the short way, since a dataset has ten thousand shards.
        return folder / reference

    # By the text first, so that nothing outside is looked at, not even for being there.
    path = Path(os.path.normpath(folder / reference))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise PlaceError(OUTSIDE)
    real = _real(path)
    # Of links only the real place counts, also of links to links.
    if not follow_links:
        allowed = [root for place in (folder, *others) for root in roots(place)]
        if not any(real.is_relative_to(root) for root in allowed):
            raise PlaceError(LINK)

    _check_kind(real.stat().st_mode, kind)
    return path


def _check_kind(mode: int, kind: PlaceKind) -> None:
    """Refuse pipes, sockets and devices, which would let the reader wait for ever."""
    if kind != "folder" and stat.S_ISREG(mode):
        return
    if kind != "file" and stat.S_ISDIR(mode):
        return
    raise PlaceError(f"is {_name(mode)}, not a {'folder' if kind == 'folder' else 'file'}")


def read_located(folder: Path, reference: str, largest: int, follow_links: bool = False) -> bytes:
    """Read all bytes of the file that `locate` returns; PlaceError too if it has more than `largest`."""
    path = locate(folder, reference, follow_links=follow_links)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        # Not `largest` alone: Python allocates what it is asked for.
        content = file.read(min(size, largest) + 1)
    if len(content) > largest:
        raise PlaceError(f"is larger than {largest} bytes")
    return content


def regular_files(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """Yield the files of a folder whose names match, by name; those that `locate` refuses are skipped."""
    for path in sorted(folder.glob(pattern)):
        try:
            yield locate(folder, str(path.relative_to(folder)))
        except (PlaceError, FileNotFoundError):
            continue


def roots(folder: Path) -> tuple[Path, ...]:
    """Return the real folders that links in `folder` may lead to.

    These are itself and, if it is a snapshot in the hub's cache, the blobs of its repository.
    """
    real = folder.resolve()
    for snapshot in (real, *real.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith(HUB_FOLDERS):
            return real, repository / "blobs"
    return (real,)


def _check_name(reference: object) -> None:
    """Refuse names that no file can have or that lead upwards; a file may hold any value as a name."""
    if not isinstance(reference, str) or not reference:
        raise PlaceError("is not a file name")
    if "\0" in reference:
        raise PlaceError("is not a file name: it holds a zero byte")
    if len(reference) > LONGEST:
        raise PlaceError("is not a file name: it is too long")
    if ".." in reference.split("/"):
        raise PlaceError(DOTS)


def _is_regular(path: str) -> bool:
    """Return whether a regular file is there; raises FileNotFoundError if nothing is."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except FileNotFoundError:
        raise
    except (OSError, ValueError):
        return False  # the long way says why


def _real(path: Path) -> Path:
    try:
        return path.resolve(strict=True)
    except RuntimeError:  # until Python 3.13, for links in a circle
        raise PlaceError("is a link that leads to itself") from None
    except UnicodeEncodeError:
        raise PlaceError("is not a file name: it is no valid Unicode") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise PlaceError("is not a file name: it is too long") from None
        if path.is_symlink() and not isinstance(error, PermissionError):
            raise PlaceError("is a link to nothing") from None
        raise


def _name(mode: int) -> str:
    names = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return names.get(stat.S_IFMT(mode), "something else")
