"""OBELICS: parquet with the parallel lists `images` (URLs) and `texts`, one of them null at each place, and `metadata`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visionloom.data.convert.interleaved import fill_document, keep_facts
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import Draft, Options, Record
from visionloom.data.convert.tables import Rows, cut_tables, decoded, read_table, table_files
from visionloom.data.write_parts import Part

_FACTS = {"document_url": "url", "url": "url"}


class Obelics:
    """One row a document; paragraphs between pictures are kept as they are."""

    facts_column = "metadata"
    """Column that holds a list, or its JSON text, with the facts of the document or of each place."""

    def parts(self, path: Path, size: int) -> Iterator[Part]:
        """Row groups of the parquet files."""
        return cut_tables(table_files(path, (".parquet",)), size)

    def records(self, where: Rows) -> Iterator[Record]:
        """One row after another."""
        return read_table(where)

    def convert(self, value: Any, draft: Draft, options: Options) -> None:
        """A document."""
        images, texts = value.get("images"), value.get("texts")
        if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
            raise Skip("lists that differ", f"images {_length(images)}, texts {_length(texts)}")
        facts = decoded(value.get(self.facts_column))
        first = next((fact for fact in facts if isinstance(fact, dict)), None) if isinstance(facts, list) else facts
        keep_facts(draft, first, _FACTS)
        general = decoded(value.get("general_metadata"))
        keep_facts(draft, general[0] if isinstance(general, list) and general else general, _FACTS)
        fill_document(draft, options.files, _items(images, texts), joint="\n\n")


def _length(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else type(value).__name__


def _items(images: list[Any], texts: list[Any]) -> Iterator[tuple[str, str]]:
    for image, text in zip(images, texts, strict=True):
        if image:
            yield "image", image
        if text:
            yield "text", text
