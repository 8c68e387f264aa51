"""The files that a source consists of: what the user named, or what lies below a folder, and never what its links lead to outside."""

from pathlib import Path

from visionloom.common import places
from visionloom.common.errors import UserError
from visionloom.common.places import PlaceError, locate


def files_below(path: Path, endings: tuple[str, ...], follow_links: bool = False) -> list[Path]:
    """A file that the user named, or the files below a folder with these endings, in sorted order.

    Raises UserError if there is none, and for one that is a link out of the folder or no file, rather than leave it out unseen.
    """
    if path.is_file():
        return [path]
    names = (
        str(one.relative_to(path))
        for one in sorted(path.rglob("*"))
        if one.suffix in endings and not one.is_dir()
    )
    found = [located(path, name, follow_links) for name in names]
    if not found:
        raise UserError(f"{path}: a file {' or '.join(endings)}, or a folder with some, expected")
    return found


def located(folder: Path, name: str, follow_links: bool = False) -> Path:
    """A file of a source, by its name in the source's folder; raises UserError for one that may not be read."""
    try:
        return locate(folder, name, follow_links=follow_links)
    except PlaceError as error:
        fix = (
            "--follow-links allows it"
            if str(error) == places.LINK
            else "put a file of the source's own in its place"
        )
        raise UserError(f"{folder / name} {error}: {fix}") from None
    except FileNotFoundError:
        raise UserError(f"{folder / name} is missing") from None
