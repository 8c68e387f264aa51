"""The files of a source: the one that the user named, or those below a folder, and never those that its links lead to outside."""

from pathlib import Path

from visionloom.common import places
from visionloom.common.errors import UserError
from visionloom.common.places import PlaceError, locate


def files_below(path: Path, endings: tuple[str, ...], follow_links: bool = False) -> list[Path]:
    """Return the file that the user named, or the files below a folder with these endings, in sorted order.

    Raises UserError if there is none, and for one that is a link out of the folder or no file, rather than leave it out unseen.
    """
    if path.is_file():
        return [path]
    files: list[Path] = []
    for file in sorted(path.rglob("*")):
        # A folder may have the name of a file, as Zarr and others have it.
        if file.suffix in endings and not file.is_dir():
            files.append(located(path, str(file.relative_to(path)), follow_links))
    if not files:
        raise UserError(f"{path}: a file {' or '.join(endings)}, or a folder with some, expected")
    return files


def located(folder: Path, name: str, follow_links: bool = False) -> Path:
    """Return the path of a file of a source, by its name in the source's folder; raises UserError for one that may not be read."""
    try:
        return locate(folder, name, follow_links=follow_links)
    except PlaceError as error:
        fix = "put a file of the source's own in its place"
        if str(error) == places.LINK:
            fix = "--follow-links allows it"
        raise UserError(f"{folder / name} {error}: {fix}") from None
    except FileNotFoundError:
        raise UserError(f"{folder / name} is missing") from None
