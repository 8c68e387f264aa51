"""MMC4: JSON lines of {"url", "text_list", "image_info": [{"raw_url", "image_name", "matched_text_index"}]}."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.interleaved import fill_document, keep_facts
from visionloom.data.convert.jsonfile import Span, cut_json, read_json
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import Draft, Options, Record
from visionloom.data.write_parts import Part


class Mmc4:
    """One line a document: each picture stands before the sentence that it was matched with."""

    def parts(self, path: Path, size: int) -> Iterator[Part]:
        """Byte ranges of the JSON files."""
        return cut_json(path, size)

    def records(self, where: Span) -> Iterator[Record]:
        """One JSON object after another."""
        return read_json(where)

    def convert(self, value: Any, draft: Draft, options: Options) -> None:
        """A document."""
        texts, pictures = value.get("text_list"), value.get("image_info") or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Skip("no text_list", f"a list of texts expected, got {type(texts).__name__}")
        keep_facts(draft, value, {"url": "url"})
        fill_document(draft, options.files, _items(texts, pictures, options.files), joint=" ")


def _items(texts: list[str], pictures: list[Any], files: MediaFiles) -> Iterator[tuple[str, str]]:
    at: dict[int, list[str]] = {}
    for picture in pictures:
        place = picture.get("matched_text_index")
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise Skip("matched_text_index outside the text", f"{place!r} of {len(texts)}")
        at.setdefault(place, []).append(_reference(picture, files))
    for place, text in enumerate(texts):
        yield from (("image", reference) for reference in at.get(place, ()))
        yield "text", text


def _reference(picture: Any, files: MediaFiles) -> str:
    """The name of the picture's file if it lies in --images-dir, else its URL."""
    name = picture.get("image_name")
    if isinstance(name, str) and name and "/" not in name and (files.roots[0] / name).is_file():
        return name
    return str(picture.get("raw_url") or name)
