"""Documents in which pictures and texts take turns, as in OBELICS, OmniCorpus and MMC4."""

from collections.abc import Iterable, Mapping
from typing import Any

from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.marks import document
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft
from visionloom.data.shards.sample import Element, Text


def fill_document(
    draft: SampleDraft, files: MediaFiles, items: Iterable[tuple[str, str]], joint: str
) -> None:
    """Make a document of ("text", text) and ("image", reference) items in order.

    A picture that is not there or cannot be read is left out and counted; texts that then touch each other are joined
    by `joint`. Raises Skip for a mark in a text, and if nothing is left.
    """
    content: list[Element] = []
    for kind, value in items:
        if kind == "text":
            text = document(value)
            last = content[-1] if content else None
            if text and isinstance(last, Text):
                content[-1] = Text(last.text + joint + text)
            elif text:
                content.append(Text(text))
            continue
        try:
            content.append(draft.image(files.read(value)))
        except Skip as skip:
            # Of billions of URLs many are gone: the rest of the document is still good.
            draft.left_out.append(skip.reason)
    if not content:
        raise Skip("empty document", f"{len(draft.left_out)} pictures left out, no text")
    draft.content = content


def keep_facts(draft: SampleDraft, facts: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Copy a document's facts into the sample's meta under other names, where they are texts or numbers."""
    for theirs, ours in names.items():
        fact = facts.get(theirs)
        if isinstance(fact, str | int | float):
            draft.meta[ours] = fact
