"""MMC4: JSON lines of {"url", "text_list", "image_info": [{"raw_url", "image_name", "matched_text_index"}]}."""

from collections.abc import Iterator
from typing import Any, ClassVar, Final

from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.formats.interleaved import fill_document
from visionloom.data.convert.json_parts import JsonSource
from visionloom.data.convert.keys import Keys, RecordFields
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft, SourceOptions

DOCUMENT: Final = Keys(
    "record", {"text_list": "sentences", "image_info": "pictures", "url": "meta.url"}
)
PICTURE: Final = Keys(
    "picture",
    {
        "image_name": "name of its file in --images-dir",
        "raw_url": "URL, where there is no such file",
        "matched_text_index": "sentence that it stands before",
    },
)


class Mmc4(JsonSource):
    """One line a document: each picture stands before the sentence that it was matched with."""

    keys: ClassVar[tuple[Keys, ...]] = (DOCUMENT, PICTURE)

    def convert(self, value: Any, draft: SampleDraft, options: SourceOptions) -> None:
        """Fill the draft with a document; raises Skip."""
        if not isinstance(value, dict):
            raise Skip("not an object", f"a JSON object expected, got {type(value).__name__}")
        record = draft.open(DOCUMENT, value)
        texts = record.take("text_list")
        pictures = record.take("image_info") or []
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Skip("no text_list", f"a list of texts expected, got {type(texts).__name__}")

        url = record.text("url")
        if url:
            draft.meta["url"] = url
        opened = [draft.open(PICTURE, picture) for picture in pictures]
        fill_document(draft, options.files, _items(texts, opened, options.files), joint=" ")


def _items(
    texts: list[str], pictures: list[RecordFields], files: MediaFiles
) -> Iterator[tuple[str, str]]:
    """Yield the sentences, each after the pictures that were matched with it; raises Skip."""
    matched: list[list[str]] = [[] for _ in texts]
    for picture in pictures:
        place = picture.take("matched_text_index")
        if not isinstance(place, int) or not 0 <= place < len(texts):
            raise Skip("matched_text_index outside the text", f"{place!r} of {len(texts)}")
        matched[place].append(_reference(picture, files))

    for text, references in zip(texts, matched, strict=True):
        for reference in references:
            yield "image", reference
        yield "text", text


def _reference(picture: RecordFields, files: MediaFiles) -> str:
    """Return the name of the picture's file if it is in --images-dir, else its URL."""
    name, url = picture.take("image_name"), picture.take("raw_url")
    # MMC4's own names have no folder; one that has is not its own.
    if isinstance(name, str) and name and "/" not in name and files.holds(name):
        return name
    return str(url or name)
