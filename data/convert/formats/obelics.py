"""OBELICS: parquet with the parallel lists `images` (URLs) and `texts`, one of them null at each place, and `metadata`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from visionloom.data.convert.formats.interleaved import fill_document, keep_facts
from visionloom.data.convert.keys import Keys, decoded
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft, SourceOptions, SourceRecord
from visionloom.data.convert.tables import RowRange, cut_tables, read_table, table_files
from visionloom.data.shards.write_parts import SourcePart

_FACTS: Final = {"document_url": "url", "url": "url"}
ROW: Final = Keys(
    "record",
    {
        "images": "URL of the picture at each place, or null",
        "texts": "text at each place, or null",
        "metadata": "meta.url",
        "general_metadata": "meta.url",
    },
)


class Obelics:
    """One row a document; paragraphs between pictures are kept as they are."""

    keys: ClassVar[tuple[Keys, ...]] = (ROW,)
    facts: ClassVar[tuple[str, ...]] = ("metadata", "general_metadata")
    """Columns that hold a list, or its JSON text, with the facts of the document or of each place."""

    def parts(self, path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
        """Yield row groups of the parquet files."""
        return cut_tables(table_files(path, (".parquet",), follow_links), size)

    def records(self, where: RowRange) -> Iterator[SourceRecord]:
        """Yield one row after another."""
        return read_table(where)

    def convert(self, value: Any, draft: SampleDraft, options: SourceOptions) -> None:
        """Fill the draft with a document; raises Skip."""
        row = draft.open(self.keys[0], value)
        images, texts = row.take("images"), row.take("texts")
        are_lists = isinstance(images, list) and isinstance(texts, list)
        # Places in both lists are the same places of the document.
        if not are_lists or len(images) != len(texts):
            raise Skip("lists that differ", f"images {_length(images)}, texts {_length(texts)}")
        for name in self.facts:
            keep_facts(draft, first_object(decoded(row.take(name))), _FACTS)
        fill_document(draft, options.files, _items(images, texts), joint="\n\n")


def first_object(value: Any) -> Mapping[str, Any]:
    """Return the facts of a document: an object, or the first one in a list; empty if there is none."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, dict):
            return one
    return {}


def _length(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else type(value).__name__


def _items(images: list[Any], texts: list[Any]) -> Iterator[tuple[str, str]]:
    for image, text in zip(images, texts, strict=True):
        if image:
            yield "image", image
        if text:
            yield "text", text
