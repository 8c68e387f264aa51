"""A training sample as it lies in a shard: schema version 1, its checks, and its JSON."""

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal, NoReturn, cast

from visionloom.common.errors import UserError

SCHEMA_VERSION: Final = 1
KINDS: Final = ("chat", "doc")
ROLES: Final = ("system", "user", "assistant", "tool")
SPACES: Final = ("px", "relative1000")
TIME_FORMATS: Final = ("seconds", "hms")
LARGEST_JSON: Final = 32 << 20
"""Bytes of a sample's JSON: the text of the longest packs has 2 million; in memory JSON may take twenty times as much."""
REF: Final = re.compile(r"(?!json$)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
"""Names of media members: no folders, no `..`, no leading dot, and never the name of the sample's own JSON."""

LOSS_MARK: Final = re.compile(
    r"(.*_)?(loss|train|trained|trainable|training|mask|masked|weight|learn|supervised?)(_.*)?"
)
"""Keys of a turn that can only mean whether it is learned. The schema's word is `loss`; others are refused, not passed over."""
LONGEST_KEY: Final = 100
"""Characters of a key that is compared with patterns like this; longer ones are no words."""
LONGEST_ID: Final = 8192
LARGEST_WEIGHT: Final = 1e6
"""In the loss: a larger one would drown all other samples, and soon float32."""
LARGEST_NUMBER: Final = 1e9
"""Seconds (32 years) and coordinates; a number that is larger is none that anybody measured."""
LARGEST_RATE: Final = 1e6
"""Frames a second; the smallest is one in so many seconds."""
LARGEST_SIDE: Final = 1 << 20
LARGEST_AREA: Final = 1 << 40
"""Pixels, and of areas, also of all frames of a video together."""
MOST_FRAMES: Final = 1 << 20
MOST_IMAGES: Final = 1 << 20
_MESSAGE_KEYS: Final = frozenset(["role", "content", "loss"])

Space = Literal["px", "relative1000"]


class SampleError(UserError):
    """One sample is at fault: the message names the sample and the dotted field."""

    def __init__(self, sample_id: str, where: str, problem: str) -> None:
        super().__init__(
            f"sample {sample_id}: {where}: {problem}" if where else f"sample {sample_id}: {problem}"
        )
        self.sample_id, self.where, self.problem = sample_id, where, problem

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str, str]]:
        return SampleError, (self.sample_id, self.where, self.problem)


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text."""

    text: str
    loss: float | None = None
    """Weight of its tokens in the loss; None takes the message's (see `element_loss`)."""


@dataclass(frozen=True, slots=True)
class Image:
    """A picture: `ref` is the media member's name; sizes in pixels, limits as areas in pixels."""

    ref: str
    width: int
    height: int
    min_pixels: int | None = None
    max_pixels: int | None = None


@dataclass(frozen=True, slots=True)
class Video:
    """A video: extracted frames with their times, or one file (`ref`) with its number of frames and its rate.

    Which frames are shown, their times and their size follow from these numbers alone; no file is opened for it.
    """

    frames: tuple[str, ...]
    """Members of the extracted frames, in order; empty for a file."""
    times: tuple[float, ...]
    """Seconds at which each frame is shown; empty for a file whose frame rate is constant."""
    width: int
    height: int
    ref: str | None = None
    """Member of the video file."""
    file_frames: int = 0
    """Frames of the file."""
    fps: float = 0.0
    """Frames per second of the file; the mean if `times` are given."""
    duration: float = 0.0
    """Seconds from the first frame to the end of the last, of the file."""
    start: float | None = None
    """Seconds: frames shown earlier are left out."""
    end: float | None = None
    """Seconds: frames shown later are left out."""
    sample_fps: float | None = None
    """Frames taken per second; like the next two it can only narrow what the run's settings say."""
    max_frames: int | None = None
    total_pixels: int | None = None
    """Most frames x height x width after resizing, in pixels."""

    @property
    def refs(self) -> tuple[str, ...]:
        """Its media members."""
        return self.frames if self.ref is None else (self.ref,)

    @property
    def frame_count(self) -> int:
        """Frames that there are, before any is chosen."""
        return len(self.frames) if self.ref is None else self.file_frames


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle on the sample's `image`-th picture (from 0), in its source pixels or in thousandths of its sides."""

    image: int
    xyxy: tuple[float, float, float, float]
    space: Space = "px"
    label: str | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A point on the sample's `image`-th picture (from 0), in its source pixels or in thousandths of its sides."""

    image: int
    xy: tuple[float, float]
    space: Space = "px"
    label: str | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Time:
    """A moment of a video in seconds, and how it is to be written."""

    seconds: float
    format: Literal["seconds", "hms"] = "seconds"
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Think:
    """Reasoning before the answer of an assistant's turn."""

    text: str
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one of the sample's tools, at the end of an assistant's turn; the results follow as messages of role tool."""

    name: str
    arguments: Mapping[str, Any]
    loss: float | None = None


Element = Text | Image | Video | Box | Point | Time | Think | ToolCall


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: tuple[Element, ...]
    loss: float | None = None
    """Weight of its tokens in the loss; None is 1 for the assistant and 0 for all others."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A chat (`messages`) or an interleaved document (`content`)."""

    id: str
    kind: str
    messages: tuple[Message, ...] = ()
    content: tuple[Element, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    """Factor on the loss of the whole sample."""
    task: str | None = None
    """Name of the evaluation task that the last assistant turn answers."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Free-form facts about the source; unknown top-level keys of the JSON are kept here."""

    @property
    def elements(self) -> tuple[Element, ...]:
        """All elements in reading order."""
        return self.content or tuple(
            element for message in self.messages for element in message.content
        )

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures in reading order: what `Box.image` counts."""
        return tuple(element for element in self.elements if isinstance(element, Image))

    @property
    def refs(self) -> tuple[str, ...]:
        """Names of all media members in reading order, each once."""
        names = (name for element in self.elements for name in media_refs(element))
        return tuple(dict.fromkeys(names))


def element_loss(element: Element, message: Message | None = None) -> float:
    """Weight of an element's tokens in the loss: its own, else its message's, else 1 for assistants and documents.

    `message` is None inside a document. Pictures and videos weigh 0: visual tokens are never predicted.
    """
    if isinstance(element, Image | Video):
        return 0.0
    if element.loss is not None:
        return element.loss
    if message is not None and message.loss is not None:
        return message.loss
    return 1.0 if message is None or message.role == "assistant" else 0.0


def parse_sample(raw: bytes | str | Mapping[str, Any], origin: str = "") -> Sample:
    """Read and check one sample of schema version 1.

    Unknown top-level keys go to `meta`; unknown keys of messages and elements are ignored, but for marks of the loss, which are
    refused. `origin` names the sample in errors as long as its id is not known. Raises SampleError with the dotted field, like
    `sample digits:12: messages[1].content[0].ref: ...`.
    """
    top = _Fields(origin or "?", "", _load(raw, origin or "?"))
    top = _Fields(top.text("id"), "", top.values)
    if type(top.values.get("v")) is not int or top.values["v"] != SCHEMA_VERSION:
        top.fail("v", f"schema version {SCHEMA_VERSION} expected, got {top.values.get('v')!r}")
    kind = top.choice("kind", KINDS)
    sample = Sample(
        id=top.sample_id,
        kind=kind,
        messages=_messages(top) if kind == "chat" else (),
        content=_content(top, role=None) if kind == "doc" else (),
        tools=_tools(top),
        weight=top.number("weight", default=1.0, low=0.0, high=LARGEST_WEIGHT),
        task=top.optional_text("task"),
        meta=_meta(top),
    )
    _check_image_indices(sample)
    return sample


def to_json(sample: Sample) -> str:
    """The sample as compact JSON of schema version 1; `parse_sample` reads it back equal.

    Raises ValueError for a number that JSON cannot hold.
    """
    document: dict[str, Any] = {"v": SCHEMA_VERSION, "id": sample.id, "kind": sample.kind}
    if sample.kind == "chat":
        document["messages"] = [_message_json(message) for message in sample.messages]
    else:
        document["content"] = [element_json(element) for element in sample.content]
    if sample.tools:
        document["tools"] = [dict(tool) for tool in sample.tools]
    if sample.weight != 1.0:
        document["weight"] = sample.weight
    if sample.task is not None:
        document["task"] = sample.task
    if sample.meta:
        document["meta"] = dict(sample.meta)
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def printable(text: str) -> str:
    """The text with what is no valid Unicode written as an escape, as in `caf\\udce9`: names of files, cut surrogate pairs."""
    return text.encode(errors="backslashreplace").decode()


def media_refs(element: Element) -> tuple[str, ...]:
    """Names of an element's media members, in order."""
    if isinstance(element, Image):
        return (element.ref,)
    return element.refs if isinstance(element, Video) else ()


def _load(raw: bytes | str | Mapping[str, Any], origin: str) -> Mapping[str, Any]:
    if not isinstance(raw, bytes | str):
        return raw
    if len(raw) > LARGEST_JSON:
        raise SampleError(origin, "", f"its JSON has {len(raw)} bytes, at most {LARGEST_JSON}")
    try:
        values = json.loads(
            raw
        )  # not load_json: a sample's own checks refuse what is not finite, and this is read in every epoch
    except (
        ValueError,
        RecursionError,
    ) as error:  # numbers of more than 4,300 digits are ValueErrors too
        raise SampleError(origin, "", f"not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise SampleError(origin, "", f"a JSON object expected, got {type(values).__name__}")
    return values


class _Fields:
    """Checked access to the values of one JSON object; every failure names the sample and the dotted field."""

    def __init__(self, sample_id: str, path: str, values: Any) -> None:
        self.sample_id, self.path = sample_id, path
        if not isinstance(
            values, dict | Mapping
        ):  # dict first: an abstract class takes ten times as long to ask
            raise SampleError(sample_id, path, f"an object expected, got {_kind_of(values)}")
        self.values: Mapping[str, Any] = values

    def fail(self, name: str, problem: str) -> NoReturn:
        raise SampleError(self.sample_id, self.at(name), problem)

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path and name else self.path or name

    def get(self, name: str) -> Any:
        if name not in self.values:
            self.fail(name, "missing")
        return self.values[name]

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str) or (name == "id" and not value):
            self.fail(name, f"a string expected, got {_kind_of(value)}")
        if name == "id" and len(value) > LONGEST_ID:
            self.fail(name, f"at most {LONGEST_ID} characters expected, got {len(value)}")
        return value

    def optional_text(self, name: str) -> str | None:
        return None if self.values.get(name) is None else self.text(name)

    def choice(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = self.values.get(name, default)
        if value not in allowed:
            self.fail(name, f"one of {', '.join(allowed)} expected, got {value!r:.80}")
        return cast(str, value)

    def number(
        self,
        name: str,
        default: float | None = None,
        low: float = -LARGEST_NUMBER,
        high: float = LARGEST_NUMBER,
    ) -> float:
        return self._number(name, self.values.get(name, default), low, high)

    def integer(self, name: str, low: int, high: int) -> int:
        value = self.get(name)
        if type(value) is not int or value < low:
            self.fail(name, f"an integer of at least {low} expected, got {value!r:.80}")
        if value > high:
            self.fail(name, f"at most {high} expected, got {value!r:.80}")
        return value

    def optional_number(self, name: str, low: float = -LARGEST_NUMBER) -> float | None:
        return None if self.values.get(name) is None else self.number(name, low=low)

    def positive(self, name: str, low: float = 0.0, high: float = LARGEST_NUMBER) -> float:
        value = self.number(name, low=0.0, high=high)
        if not value:
            self.fail(name, "more than 0 expected")
        if value < low:
            self.fail(name, f"at least {low:g} expected, got {value:g}")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        return None if self.values.get(name) is None else self.integer(name, low, high)

    def loss(self) -> float | None:
        return (
            None
            if self.values.get("loss") is None
            else self.number("loss", low=0.0, high=LARGEST_WEIGHT)
        )

    def items(self, name: str) -> list[Any]:
        value = self.get(name)
        if not isinstance(value, list | tuple):
            self.fail(name, f"a list expected, got {_kind_of(value)}")
        return list(value)

    def numbers(
        self, name: str, count: int | None = None, low: float = -LARGEST_NUMBER
    ) -> tuple[float, ...]:
        items = self.items(name)
        if count is not None and len(items) != count:
            self.fail(name, f"{count} numbers expected, got {len(items)}")
        if all(
            type(item) is float and low <= item <= LARGEST_NUMBER for item in items
        ):  # quick for the times of long videos
            return tuple(items)
        return tuple(
            self._number(f"{name}[{index}]", item, low, LARGEST_NUMBER)
            for index, item in enumerate(items)
        )

    def _number(self, name: str, value: Any, low: float, high: float) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) <= sys.float_info.max
        ):
            self.fail(name, f"a finite number expected, got {value!r:.80}")
        if value < low:
            self.fail(name, f"at least {low:g} expected, got {value!r:.80}")
        if value > high:
            self.fail(name, f"at most {high:g} expected, got {value!r:.80}")
        return float(value)

    def ref(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or len(value) > 80 or REF.fullmatch(value) is None:
            self.fail(name, f"a plain member name like img0.png expected, got {value!r:.100}")
        return value


def _kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _messages(top: _Fields) -> tuple[Message, ...]:
    messages = tuple(
        _message(_Fields(top.sample_id, f"messages[{index}]", value), index)
        for index, value in enumerate(top.items("messages"))
    )
    if not messages:
        top.fail("messages", "at least one message expected")
    return messages


def _message(fields: _Fields, index: int) -> Message:
    role = fields.choice("role", ROLES)
    if role == "system" and index > 0:
        fields.fail("role", "a system message comes first or not at all")
    for name in fields.values.keys() - _MESSAGE_KEYS:
        if len(name) <= LONGEST_KEY and LOSS_MARK.fullmatch(name):
            fields.fail(
                name, "unknown mark of the loss: loss is the schema's word, a weight from 0"
            )
    return Message(role, _content(fields, role), fields.loss())


def _content(fields: _Fields, role: str | None) -> tuple[Element, ...]:
    if isinstance(fields.values.get("content"), str) and role is not None:
        return (Text(fields.values["content"]),)
    elements = tuple(
        _element(_Fields(fields.sample_id, f"{fields.at('content')}[{index}]", value), role)
        for index, value in enumerate(fields.items("content"))
    )
    if not elements and role is None:
        fields.fail("content", "at least one element expected")
    if any(
        isinstance(one, ToolCall) and not isinstance(other, ToolCall)
        for one, other in pairwise(elements)
    ):
        fields.fail("content", "tool calls come last in a message")
    return elements


def _element(fields: _Fields, role: str | None) -> Element:
    kind = fields.choice("type", tuple(_READERS))
    if kind in ("think", "tool_call") and role != "assistant":
        fields.fail("type", f"{kind} belongs to assistant messages only")
    return _READERS[kind](fields)


def _text(fields: _Fields) -> Text:
    return Text(fields.text("text"), fields.loss())


def _think(fields: _Fields) -> Think:
    return Think(fields.text("text"), fields.loss())


def _image(fields: _Fields) -> Image:
    return Image(
        fields.ref("ref", fields.get("ref")),
        fields.integer("w", 1, LARGEST_SIDE),
        fields.integer("h", 1, LARGEST_SIDE),
        fields.optional_integer("min_pixels", 1, LARGEST_AREA),
        fields.optional_integer("max_pixels", 1, LARGEST_AREA),
    )


def _video(fields: _Fields) -> Video:
    width, height = fields.integer("w", 1, LARGEST_SIDE), fields.integer("h", 1, LARGEST_SIDE)
    if "ref" in fields.values:
        ref, count = fields.ref("ref", fields.get("ref")), fields.integer("frames", 1, MOST_FRAMES)
        times = () if fields.values.get("t") is None else _times(fields, count)
        whole: dict[str, Any] = {"ref": ref, "file_frames": count}
        whole |= {
            "fps": fields.positive("fps", 1 / LARGEST_RATE, LARGEST_RATE),
            "duration": fields.positive("duration"),
        }
        return Video((), times, width, height, **whole, **_part(fields))
    frames = tuple(
        fields.ref(f"frames[{i}]", name) for i, name in enumerate(fields.items("frames"))
    )
    if not frames:
        fields.fail("frames", "at least one frame expected")
    return Video(frames, _times(fields, len(frames)), width, height, **_part(fields))


def _times(fields: _Fields, count: int) -> tuple[float, ...]:
    times = fields.numbers("t", low=0.0)
    if len(times) != count:
        fields.fail("t", f"one time for each of the {count} frames expected, got {len(times)}")
    if any(later < earlier for earlier, later in pairwise(times)):
        fields.fail("t", "times must not decrease")
    return times


def _part(fields: _Fields) -> dict[str, Any]:
    """What narrows a video: the part that is shown and its own limits."""
    start, end = fields.optional_number("start", low=0.0), fields.optional_number("end", low=0.0)
    if start is not None and end is not None and end <= start:
        fields.fail("end", f"after start ({start:g} s) expected, got {end:g}")
    rate = (
        None
        if fields.values.get("sample_fps") is None
        else fields.positive("sample_fps", 1 / LARGEST_RATE, LARGEST_RATE)
    )
    limits = {
        name: fields.optional_integer(name, 1, LARGEST_AREA)
        for name in ("max_frames", "total_pixels")
    }
    return {"start": start, "end": end, "sample_fps": rate, **limits}


def _box(fields: _Fields) -> Box:
    x1, y1, x2, y2 = xyxy = _coordinates(fields, "xyxy", 4)
    if x2 < x1 or y2 < y1:
        fields.fail("xyxy", f"x1 <= x2 and y1 <= y2 expected, got {list(xyxy)}")
    return Box(
        fields.integer("image", 0, MOST_IMAGES),
        (x1, y1, x2, y2),
        _space(fields),
        fields.optional_text("label"),
        fields.loss(),
    )


def _point(fields: _Fields) -> Point:
    x, y = _coordinates(fields, "xy", 2)
    return Point(
        fields.integer("image", 0, MOST_IMAGES),
        (x, y),
        _space(fields),
        fields.optional_text("label"),
        fields.loss(),
    )


def _time(fields: _Fields) -> Time:
    format_name = cast(
        Literal["seconds", "hms"], fields.choice("fmt", TIME_FORMATS, default="seconds")
    )
    return Time(fields.number("t", low=0.0), format_name, fields.loss())


def _tool_call(fields: _Fields) -> ToolCall:
    arguments = _Fields(fields.sample_id, fields.at("arguments"), fields.get("arguments"))
    return ToolCall(fields.text("name"), arguments.values, fields.loss())


_READERS: Final[dict[str, Callable[[_Fields], Element]]] = {
    "text": _text,
    "image": _image,
    "video": _video,
    "box": _box,
    "point": _point,
    "time": _time,
    "think": _think,
    "tool_call": _tool_call,
}


def _space(fields: _Fields) -> Space:
    return cast(Space, fields.choice("space", SPACES, default="px"))


def _coordinates(fields: _Fields, name: str, count: int) -> tuple[float, ...]:
    numbers = fields.numbers(name, count)
    if _space(fields) == "relative1000" and not all(0 <= number <= 1000 for number in numbers):
        fields.fail(
            name, f"numbers from 0 to 1000 expected in space relative1000, got {list(numbers)}"
        )
    return numbers


def _tools(top: _Fields) -> tuple[Mapping[str, Any], ...]:
    if top.values.get("tools") is None:
        return ()
    return tuple(
        _Fields(top.sample_id, f"tools[{i}]", tool).values
        for i, tool in enumerate(top.items("tools"))
    )


def _meta(top: _Fields) -> Mapping[str, Any]:
    known = {"v", "id", "kind", "messages", "content", "tools", "weight", "task", "meta"}
    unknown = {name: value for name, value in top.values.items() if name not in known}
    meta = top.values.get("meta")
    return unknown if meta is None else {**unknown, **_Fields(top.sample_id, "meta", meta).values}


def _check_image_indices(sample: Sample) -> None:
    placed = [element for element in sample.elements if isinstance(element, Box | Point)]
    count = len(sample.images) if placed else 0
    for element in placed:
        if element.image >= count:
            kind = type(element).__name__.lower()
            raise SampleError(
                sample.id,
                f"{kind}.image",
                f"picture {element.image} of {count} (they count from 0)",
            )


def _message_json(message: Message) -> dict[str, Any]:
    loss = {} if message.loss is None else {"loss": message.loss}
    return {
        "role": message.role,
        **loss,
        "content": [element_json(element) for element in message.content],
    }


def element_json(element: Element) -> dict[str, Any]:
    """An element as the JSON object of the schema."""
    match element:
        case Text() | Think():
            values: dict[str, Any] = {"type": type(element).__name__.lower(), "text": element.text}
        case Image():
            values = {"type": "image", "ref": element.ref, "w": element.width, "h": element.height}
            values |= {"min_pixels": element.min_pixels, "max_pixels": element.max_pixels}
        case Video():
            values = _video_json(element)
        case Box():
            values = {
                "type": "box",
                "image": element.image,
                "xyxy": list(element.xyxy),
                "space": element.space,
            }
        case Point():
            values = {
                "type": "point",
                "image": element.image,
                "xy": list(element.xy),
                "space": element.space,
            }
        case Time():
            values = {"type": "time", "t": element.seconds, "fmt": element.format}
        case ToolCall():
            values = {
                "type": "tool_call",
                "name": element.name,
                "arguments": dict(element.arguments),
            }
    optional = {"label": getattr(element, "label", None), "loss": getattr(element, "loss", None)}
    return {name: value for name, value in (values | optional).items() if value is not None}


def _video_json(video: Video) -> dict[str, Any]:
    times = {"t": list(video.times)} if video.times else {}
    if video.ref is None:
        found: dict[str, Any] = {"type": "video", "frames": list(video.frames), **times}
    else:
        found = {
            "type": "video",
            "ref": video.ref,
            "frames": video.file_frames,
            "fps": video.fps,
            "duration": video.duration,
        }
        found |= times
    part = ("start", "end", "sample_fps", "max_frames", "total_pixels")
    return (
        found
        | {"w": video.width, "h": video.height}
        | {name: getattr(video, name) for name in part}
    )
