"""LLaVA's format: a JSON array or lines of {"id", "image" or "video", "conversations": [{"from", "value"}, ...]}."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visionloom.data.convert.chats import Chat
from visionloom.data.convert.jsonfile import Span, cut_json, read_json
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import Draft, Options, Record
from visionloom.data.write_parts import Part


class Llava:
    """Conversations with `<image>` and `<video>` in their texts; ids and other short facts are kept."""

    turns: tuple[str, ...] = ("conversations",)
    """Names under which a record's turns may stand."""

    def parts(self, path: Path, size: int) -> Iterator[Part]:
        """Byte ranges of the JSON files."""
        return cut_json(path, size)

    def records(self, where: Span) -> Iterator[Record]:
        """One JSON object after another."""
        return read_json(where)

    def convert(self, value: Any, draft: Draft, options: Options) -> None:
        """A chat."""
        if not isinstance(value, dict):
            raise Skip("not an object", f"a JSON object expected, got {type(value).__name__}")
        found = next((value[name] for name in self.turns if name in value), None)
        if isinstance(value.get("id"), str | int):
            draft.id = str(value["id"])
        if isinstance(value.get("data_source"), str):
            draft.meta["source"] = value["data_source"]
        if isinstance(value.get("system"), str) and value["system"] and isinstance(found, list):
            found = [{"from": "system", "value": value["system"]}, *found]
        Chat(value, draft, options.files).fill(found)
