"""JSON lines of plain texts ({"text": ...}) or of our own schema.

In samples of our schema a picture or video may name a file in place of its member: {"type": "image", "file": "a/b.jpg"},
{"type": "video", "file": "c.mp4"} or {"type": "video", "files": [...], "t": [...]}. Sizes are filled in; boxes in pixels are
those of the upright picture.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Final

from visionloom.data.convert.json_parts import RecordSpan, cut_json, read_json
from visionloom.data.convert.keys import Keys
from visionloom.data.convert.marks import document
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft, SourceOptions, SourceRecord
from visionloom.data.convert.videos import add_video
from visionloom.data.shards.sample import SCHEMA_VERSION, Box, Image, Point, Text, Video
from visionloom.data.shards.sample_json import element_json, parse_sample
from visionloom.data.shards.write_parts import SourcePart

_TEXTS: Final = ("text", "content")
_IDS: Final = ("id", "doc_id", "url")
LINE: Final = Keys(
    "record",
    {
        "text": "the document",
        "content": "the document",
        "id": "id of the sample",
        "doc_id": "id of the sample",
        "url": "meta.url, and id of the sample where there is no other",
        "weight": "factor on the loss of the sample",
    },
)
"""A line of plain text."""
SAMPLE: Final = Keys(
    "sample",
    dict.fromkeys(
        ("v", "id", "kind", "messages", "content", "tools", "weight", "task", "meta"),
        "as our schema",
    ),
    "meta",
)
"""A line of our own schema; other keys are kept in the sample's meta."""
MESSAGE: Final = Keys("turn", dict.fromkeys(("role", "content", "loss"), "as our schema"))
_NARROWING: Final = (
    "start",
    "end",
    "video_start",
    "video_end",
    "sample_fps",
    "max_frames",
    "total_pixels",
)
_OF_FILES: Final = ("file", "ref", "files", "frames", "w", "h", "t", "fps", "duration")
"""Keys of an element that its media member answers."""
ELEMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("text", "loss"),
    "think": ("text", "loss"),
    "image": ("file", "ref", "w", "h", "min_pixels", "max_pixels"),
    "video": (*_OF_FILES, *_NARROWING),
    "box": ("image", "xyxy", "space", "label", "loss"),
    "point": ("image", "xy", "space", "label", "loss"),
    "time": ("t", "fmt", "loss"),
    "tool_call": ("name", "arguments", "loss"),
}
_KINDS: Final = {"image": "picture", "think": "thought", "tool_call": "call"}
ELEMENT: Final = {
    name: Keys(_KINDS.get(name, name), dict.fromkeys(("type", *keys), "as our schema"))
    for name, keys in ELEMENTS.items()
}
"""The keys of each element of our schema."""


class JsonLines:
    """One line a document, or one sample of our schema."""

    keys: ClassVar[tuple[Keys, ...]] = (LINE, SAMPLE, MESSAGE, *ELEMENT.values())

    def parts(self, path: Path, size: int, follow_links: bool = False) -> Iterator[SourcePart]:
        """Byte ranges of the JSON files."""
        return cut_json(path, size, follow_links)

    def records(self, where: RecordSpan) -> Iterator[SourceRecord]:
        """One JSON object after another."""
        return read_json(where)

    def convert(self, value: Any, draft: SampleDraft, options: SourceOptions) -> None:
        """A document of one text, or what our schema says."""
        if not isinstance(value, dict):
            raise Skip("not an object", f"a JSON object expected, got {type(value).__name__}")
        if isinstance(value.get("messages", value.get("content")), list):
            fill_from_schema(value, draft, options)
            return
        line = draft.open(LINE, value)
        text = line.take(*_TEXTS)
        if not isinstance(text, str) or not (text := document(text)).strip():
            raise Skip(
                "no text",
                f'a line like {{"text": "..."}} expected, got the keys {", ".join(list(value)[:8])}',
            )
        draft.id = line.text(*_IDS)
        if url := line.text("url"):
            draft.meta["url"] = url
        weight = line.number("weight")
        draft.weight = 1.0 if weight is None else weight
        draft.content = [Text(text)]


def fill_from_schema(value: Mapping[str, Any], draft: SampleDraft, options: SourceOptions) -> None:
    """Take a sample of our schema over, with its media read by `options.files`."""
    if "kind" not in value:
        raise Skip(
            "not our schema",
            "key kind missing; chats of other formats are read by the kind sharegpt, tables by hf",
        )
    draft.open(SAMPLE, value)
    filler, sample = _Filler(draft, options), {"v": SCHEMA_VERSION, **value}
    if isinstance(sample.get("messages"), list):
        sample["messages"] = [filler.message(turn) for turn in sample["messages"]]
    sample["content"] = filler.elements(sample.get("content"))
    draft.whole = parse_sample(sample)
    if filler.other_size and any(
        isinstance(one, Box | Point) and one.space == "px" for one in draft.whole.elements
    ):
        raise Skip(
            "boxes of another size",
            f"{filler.other_size}: boxes and sizes of the upright picture expected",
        )


class _Filler:
    """Replaces what the elements say of their files by members and true sizes."""

    def __init__(self, draft: SampleDraft, options: SourceOptions) -> None:
        self.draft, self.files = draft, options.files
        self.other_size = ""

    def message(self, turn: Any) -> Any:
        if not isinstance(turn, dict):
            return turn
        self.draft.open(MESSAGE, turn).take_all(*MESSAGE.read)
        return {**turn, "content": self.elements(turn["content"])} if "content" in turn else turn

    def elements(self, content: Any) -> Any:
        """The elements of a turn or document."""
        return (
            [self._element(element) for element in content]
            if isinstance(content, list)
            else content
        )

    def _element(self, element: Any) -> Any:
        kind = element.get("type") if isinstance(element, dict) else None
        if not isinstance(kind, str) or kind not in ELEMENT:
            return element
        fields = self.draft.open(ELEMENT[kind], element)
        fields.take_all(*ELEMENT[kind].read)
        if kind == "image":
            return self._filled(
                element, self.draft.image(self.files.read(fields.take("file", "ref")))
            )
        if kind == "video":
            given = fields.take("file", "ref", "files", "frames")
            return self._filled(element, add_video(self.draft, self.files, given, fields))
        return element

    def _filled(self, element: Mapping[str, Any], media: Image | Video) -> Mapping[str, Any]:
        said = element.get("w", media.width), element.get("h", media.height)
        if said != (media.width, media.height):
            self.other_size = f"{said[0]}x{said[1]} said, {media.width}x{media.height} found"
        kept = {name: value for name, value in element.items() if name not in _OF_FILES}
        return {**kept, **element_json(media)}
