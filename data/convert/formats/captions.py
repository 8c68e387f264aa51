"""Documents of pictures or videos and their caption."""

import re
from collections.abc import Sequence

from visionloom.data.convert.chat_content import trimmed
from visionloom.data.convert.marks import document
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft
from visionloom.data.shards.sample import Element, Image, Text, Video


def fill_caption(draft: SampleDraft, media: Sequence[Image | Video], text: str) -> None:
    """Make the draft a document: the media where the caption has their placeholders, else before it.

    Raises Skip for a mark in the caption, and for placeholders that are not those of the media.
    """
    names = ["<image>" if isinstance(one, Image) else "<video>" for one in media]
    # The odd pieces are placeholders.
    placeholder = "|".join(sorted(set(names)))
    pieces = re.split(f"({placeholder})", document(text).strip())
    if not "".join(pieces[::2]).strip():
        # Placeholders alone say nothing.
        raise Skip("no caption", "")

    asked = pieces[1::2]
    if asked and asked != names:
        difference = f"{' '.join(asked)[:80]}, given {' '.join(names)[:80]}"
        raise Skip("placeholders that do not match the media", difference)
    if not asked and len(media) > 1:
        draft.notes.append("samples with several pictures or videos, all before the caption")

    content: list[Element] = [] if asked else [*media]
    for place in range(len(pieces)):
        if place % 2:
            content.append(media[place // 2])
            continue
        kept = trimmed(pieces, place)
        if kept:
            content.append(Text(kept))
    draft.content = content
