"""LLaVA's format: a JSON array or lines of {"id", "image" or "video", "conversations": [{"from", "value"}, ...]}."""

from typing import Any, ClassVar

from visionloom.data.convert.chat_keys import RECORD, chat_keys
from visionloom.data.convert.chats import Chat
from visionloom.data.convert.json_parts import JsonSource
from visionloom.data.convert.keys import Keys
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft, SourceOptions


class Llava(JsonSource):
    """Conversations with `<image>` and `<video>` in their texts; ids and other short facts are kept."""

    keys: ClassVar[tuple[Keys, ...]] = chat_keys(RECORD)

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
