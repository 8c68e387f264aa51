"""The keys of conversations: of a record, a turn, and each kind of part of a turn."""

from typing import Final

from visionloom.data.convert.keys import LOSS_KEYS, Keys
from visionloom.data.convert.marks import CALL
from visionloom.data.convert.objects import OBJECTS
from visionloom.data.convert.videos import VIDEO, VIDEO_PART

RECORD: Final = Keys(
    "record",
    {
        "id": "id of the sample",
        "messages": "turns",
        "conversations": "turns",
        "conversation": "turns",
        "system": "system turn",
        "system_prompt": "system turn",
        "image": "pictures",
        "images": "pictures",
        "video": "videos",
        "videos": "videos",
        "t": "seconds of each frame, where a video is a list of frames",
        "fps": "rate of a video's frames, where it is a list of frames",
        "tools": "tools that may be called",
        "objects": "boxes, points and names for `<bbox>` and `<ref-object>`",
        "weight": "factor on the loss of the sample",
        "task": "evaluation task that the last answer belongs to",
        "data_source": "meta.source",
        "source": "meta.source",
    },
)
TURN: Final = Keys(
    "turn",
    {
        "from": "role",
        "role": "role",
        "value": "content",
        "content": "content",
        "tool_calls": "calls of tools",
        "function_call": "call of a tool",
        "reasoning_content": "thought before the answer",
        "reasoning": "thought before the answer",
        "thinking": "thought before the answer",
        "image": "pictures of the turn",
        "images": "pictures of the turn",
        "video": "videos of the turn",
        "videos": "videos of the turn",
        **dict.fromkeys(LOSS_KEYS, "weight in the loss"),
    },
)
TEXT: Final = Keys(
    "text",
    {
        "type": "kind of the part",
        "text": "text with placeholders",
        **dict.fromkeys(LOSS_KEYS, "weight in the loss"),
    },
)
THOUGHT: Final = Keys(
    "thought",
    {
        "type": "kind of the part",
        "text": "thought before the answer",
        "thinking": "thought before the answer",
        "reasoning": "thought before the answer",
        **dict.fromkeys(LOSS_KEYS, "weight in the loss"),
    },
)
REFERENCES: Final = (
    "image",
    "image_url",
    "url",
    "path",
    "file",
    "source",
    "base64",
    "data",
    "bytes",
)
PICTURE: Final = Keys(
    "picture",
    {
        "type": "kind of the part",
        **dict.fromkeys(REFERENCES, "name of a file, an object with it, or the bytes"),
        "media_type": "no effect: the bytes tell",
        "min_pixels": "smallest area",
        "max_pixels": "largest area",
    },
)
"""A typed part of a turn, and an object in place of a picture's name."""


def chat_keys(record: Keys) -> tuple[Keys, ...]:
    """Return the tables of a format whose records are conversations."""
    return record, TURN, TEXT, THOUGHT, PICTURE, VIDEO_PART, VIDEO, CALL, OBJECTS
