"""LLaVA's format: a JSON array or lines of {"id", "image" or "video", "conversations": [{"from", "value"}, ...]}."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from visionloom.data.convert.chat_keys import RECORD, chat_keys
from visionloom.data.convert.chats import Chat
from visionloom.data.convert.json_parts import RecordSpan, cut_json, read_json
from visionloom.data.convert.keys import Keys
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft, SourceOptions, SourceRecord
from visionloom.data.shards.write_parts import SourcePart


class Llava:
    """Conversations with `<image>` and `<video>` in their texts; ids and other short facts are kept."""

    keys: ClassVar[tuple[Keys, ...]] = chat_keys(RECORD)

    def parts(self, path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
        """Yield byte ranges of the JSON files."""
        return cut_json(path, size, follow_links)

    def records(self, where: RecordSpan) -> Iterator[SourceRecord]:
        """Yield one JSON object after another."""
        return read_json(where)

    def convert(self, value: Any, draft: SampleDraft, options: SourceOptions) -> None:
        """Fill the draft with a chat; raises Skip."""
        if not isinstance(value, dict):
            raise Skip("not an object", f"a JSON object expected, got {type(value).__name__}")
        record = draft.open(RECORD, value)
        # Ids are numbers in some sets, texts in others.
        draft.id = record.text("id")
        source = record.text("data_source", "source")
        if source:
            draft.meta["source"] = source
        chat = Chat(record, draft, options.files)
        chat.fill(record.take("messages", "conversations", "conversation"))
