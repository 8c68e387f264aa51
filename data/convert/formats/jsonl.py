"""JSON lines of plain texts ({"text": ...}) or of our own schema.

In samples of our schema a picture or video may name a file in place of its member: {"type": "image", "file": "a/b.jpg"},
{"type": "video", "file": "c.mp4"} or {"type": "video", "files": [...], "t": [...]}. Sizes are filled in; boxes in pixels are
those of the upright picture.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from visionloom.data.convert.json_parts import JsonSource
from visionloom.data.convert.keys import Keys
from visionloom.data.convert.marks import document
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft, SourceOptions
from visionloom.data.convert.videos import add_video
from visionloom.data.shards.sample import SCHEMA_VERSION, Box, Image, Point, Sample, Text, Video
from visionloom.data.shards.sample_json import element_json, parse_sample

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
_AS_OURS: Final = "as our schema"
_SAMPLE: Final = ("v", "id", "kind", "messages", "content", "tools", "weight", "task", "meta")
SAMPLE: Final = Keys("sample", dict.fromkeys(_SAMPLE, _AS_OURS), "meta")
"""A line of our own schema; other keys are kept in the sample's meta."""
MESSAGE: Final = Keys("turn", dict.fromkeys(("role", "content", "loss"), _AS_OURS))
_SPAN: Final = ("start", "end", "video_start", "video_end")
_NARROWING: Final = (*_SPAN, "sample_fps", "max_frames", "total_pixels")
_OF_FILES: Final = ("file", "ref", "files", "frames", "w", "h", "t", "fps", "duration")
"""Keys of an element whose values come from its media member."""
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


def _element_keys(name: str) -> Keys:
    return Keys(_KINDS.get(name, name), dict.fromkeys(("type", *ELEMENTS[name]), _AS_OURS))


ELEMENT: Final = {name: _element_keys(name) for name in ELEMENTS}
"""The keys of each element of our schema."""


class JsonLines(JsonSource):
    """One line a document, or one sample of our schema."""

    keys: ClassVar[tuple[Keys, ...]] = (LINE, SAMPLE, MESSAGE, *ELEMENT.values())

    def convert(self, value: Any, draft: SampleDraft, options: SourceOptions) -> None:
        """Fill the draft with a document of one text, or a sample of our schema; raises Skip."""
        if not isinstance(value, dict):
            raise Skip("not an object", f"a JSON object expected, got {type(value).__name__}")
        if isinstance(value.get("messages", value.get("content")), list):
            fill_from_schema(value, draft, options)
            return

        line = draft.open(LINE, value)
        given = line.take(*_TEXTS)
        text = document(given) if isinstance(given, str) else ""
        if not text.strip():
            keys = ", ".join(list(value)[:8])
            raise Skip("no text", f'a line like {{"text": "..."}} expected, got the keys {keys}')
        draft.id = line.text(*_IDS)
        url = line.text("url")
        if url:
            draft.meta["url"] = url
        weight = line.number("weight")
        draft.weight = 1.0 if weight is None else weight
        draft.content = [Text(text)]


def fill_from_schema(value: Mapping[str, Any], draft: SampleDraft, options: SourceOptions) -> None:
    """Take a sample of our schema over, with its media read by `options.files`."""
    if "kind" not in value:
        fix = "chats of other formats are read by the kind sharegpt, tables by hf"
        raise Skip("not our schema", f"key kind missing; {fix}")
    draft.open(SAMPLE, value)
    filler = _Filler(draft, options)
    sample = {"v": SCHEMA_VERSION, **value}
    if isinstance(sample.get("messages"), list):
        sample["messages"] = [filler.message(turn) for turn in sample["messages"]]
    sample["content"] = filler.elements(sample.get("content"))
    draft.whole = parse_sample(sample)
    filler.check_boxes(draft.whole)


class _Filler:
    """Replaces the names of files in elements by members, and their sizes by the true ones."""

    def __init__(self, draft: SampleDraft, options: SourceOptions) -> None:
        self.draft, self.files = draft, options.files
        self.other_size = ""

    def check_boxes(self, sample: Sample) -> None:
        """Raise Skip for boxes in pixels where a picture has another size than its element says."""
        if not self.other_size:
            return
        for element in sample.elements:
            if isinstance(element, Box | Point) and element.space == "px":
                problem = f"{self.other_size}: boxes and sizes of the upright picture expected"
                raise Skip("boxes of another size", problem)

    def message(self, turn: Any) -> Any:
        """Fill the elements of a turn; a turn that is no object stays, for the schema's own check."""
        if not isinstance(turn, dict):
            return turn
        # Read here only to count the keys that our schema does not have.
        self.draft.open(MESSAGE, turn).take_all(*MESSAGE.read)
        if "content" not in turn:
            return turn
        return {**turn, "content": self.elements(turn["content"])}

    def elements(self, content: Any) -> Any:
        """Fill the elements of a turn or document; anything but a list stays, for the schema's own check."""
        if not isinstance(content, list):
            return content
        return [self._element(element) for element in content]

    def _element(self, element: Any) -> Any:
        kind = element.get("type") if isinstance(element, dict) else None
        if not isinstance(kind, str) or kind not in ELEMENT:
            return element
        keys = ELEMENT[kind]
        fields = self.draft.open(keys, element)
        fields.take_all(*keys.read)
        if kind == "image":
            data = self.files.read(fields.take("file", "ref"))
            return self._filled(element, self.draft.image(data))
        if kind == "video":
            given = fields.take("file", "ref", "files", "frames")
            video = add_video(self.draft, self.files, given, fields)
            return self._filled(element, video)
        return element

    def _filled(self, element: Mapping[str, Any], media: Image | Video) -> Mapping[str, Any]:
        """Return the element with the member and true size of its media, in place of those that it names."""
        width, height = element.get("w", media.width), element.get("h", media.height)
        if (width, height) != (media.width, media.height):
            given, true = f"{width}x{height}", f"{media.width}x{media.height}"
            self.other_size = f"{given} said, {true} found"
        kept = {name: value for name, value in element.items() if name not in _OF_FILES}
        return {**kept, **element_json(media)}
