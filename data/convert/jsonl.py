"""JSON lines of plain texts ({"text": ...}) or of our own schema.

In samples of our schema a picture or video may name a file in place of its member: {"type": "image", "file": "a/b.jpg"},
{"type": "video", "file": "c.mp4"} or {"type": "video", "files": [...], "t": [...]}. Sizes are filled in; boxes in pixels are
those of the upright picture.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from visionloom.data.convert.jsonfile import Span, cut_json, read_json
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import Draft, Options, Record
from visionloom.data.convert.videos import add_video
from visionloom.data.sample import SCHEMA_VERSION, Box, Image, Point, Text, Video, element_json, parse_sample
from visionloom.data.write_parts import Part

_TEXT_KEYS: Final = ("text", "content")
_ID_KEYS: Final = ("id", "doc_id", "url")
_VIDEO_KEYS: Final = ("file", "ref", "files", "frames")
_FILE_KEYS: Final = ("file", "files", "ref", "frames", "t", "w", "h")


class JsonLines:
    """One line a document, or one sample of our schema."""

    def parts(self, path: Path, size: int) -> Iterator[Part]:
        """Byte ranges of the JSON files."""
        return cut_json(path, size)

    def records(self, where: Span) -> Iterator[Record]:
        """One JSON object after another."""
        return read_json(where)

    def convert(self, value: Any, draft: Draft, options: Options) -> None:
        """A document of one text, or what our schema says."""
        if not isinstance(value, dict):
            raise Skip("not an object", f"a JSON object expected, got {type(value).__name__}")
        if isinstance(value.get("messages", value.get("content")), list):
            fill_from_schema(value, draft, options)
            return
        text = next((value[key] for key in _TEXT_KEYS if isinstance(value.get(key), str)), None)
        if text is None or not text.strip():
            raise Skip("no text", f'a line like {{"text": "..."}} expected, got the keys {", ".join(list(value)[:8])}')
        draft.id = next((str(value[key]) for key in _ID_KEYS if isinstance(value.get(key), str | int)), None)
        draft.meta.update({"url": value["url"]} if isinstance(value.get("url"), str) else {})
        draft.content = [Text(text)]


def fill_from_schema(value: Mapping[str, Any], draft: Draft, options: Options) -> None:
    """Take a sample of our schema over, with its media read by `options.files`."""
    filler, document = _Filler(draft, options), {"v": SCHEMA_VERSION, **value}
    if isinstance(document.get("messages"), list):
        document["messages"] = [
            {**turn, "content": filler.elements(turn["content"])} if "content" in turn else turn
            for turn in document["messages"]
        ]
    document["content"] = filler.elements(document.get("content"))
    draft.whole = parse_sample(document)
    if filler.other_size and any(isinstance(one, Box | Point) and one.space == "px" for one in draft.whole.elements):
        raise Skip("boxes of another size", f"{filler.other_size}: boxes and sizes of the upright picture expected")


class _Filler:
    """Replaces what the elements say of their files by members and true sizes."""

    def __init__(self, draft: Draft, options: Options) -> None:
        self.draft, self.files = draft, options.files
        self.other_size = ""

    def elements(self, content: Any) -> Any:
        return [self._element(element) for element in content] if isinstance(content, list) else content

    def _element(self, element: Any) -> Any:
        kind = element.get("type") if isinstance(element, dict) else None
        if kind == "image":
            return self._filled(element, self.draft.image(self.files.read(element.get("file", element.get("ref")))))
        if kind == "video":
            given = next((element[name] for name in _VIDEO_KEYS if name in element), None)
            return self._filled(element, add_video(self.draft, self.files, given, element))
        return element

    def _filled(self, element: Mapping[str, Any], media: Image | Video) -> Mapping[str, Any]:
        said = element.get("w", media.width), element.get("h", media.height)
        if said != (media.width, media.height):
            self.other_size = f"{said[0]}x{said[1]} said, {media.width}x{media.height} found"
        kept = {name: value for name, value in element.items() if name not in _FILE_KEYS}
        return {**kept, **element_json(media)}
