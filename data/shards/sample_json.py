"""The JSON form of a sample, schema version 1: reading with every check, and writing."""

import json
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Final, Literal, cast

from visionloom.data.shards.sample import (
    KINDS,
    ROLES,
    SCHEMA_VERSION,
    SPACES,
    TIME_FORMATS,
    Box,
    Element,
    Image,
    Message,
    Point,
    Sample,
    Space,
    Text,
    Think,
    Time,
    ToolCall,
    Video,
)
from visionloom.data.shards.sample_fields import (
    LARGEST_WEIGHT,
    RawSample,
    SampleFields,
    load_object,
)

LOSS_MARK: Final = re.compile(
    r"(.*_)?(loss|train|trained|trainable|training|mask|masked|weight|learn|supervised?)(_.*)?"
)
"""Keys of a turn that can only mean that it is learned or not. The schema's word is `loss`; others are refused, not ignored."""
LONGEST_KEY: Final = 100
"""Characters of a key that is compared with patterns like this; longer ones are no words."""
LARGEST_SIDE: Final = 1 << 20
LARGEST_AREA: Final = 1 << 40
"""Pixels, also of all frames of a video together."""
MOST_FRAMES: Final = 1 << 20
MOST_IMAGES: Final = 1 << 20
_MESSAGE_KEYS: Final = frozenset(["role", "content", "loss"])
_TOP_KEYS: Final = frozenset(
    ["v", "id", "kind", "messages", "content", "tools", "weight", "task", "meta"]
)


def parse_sample(raw: RawSample, origin: str = "") -> Sample:
    """Read and check one sample of schema version 1.

    Unknown top-level keys go to `meta`; unknown keys of messages and elements are ignored, except marks of the loss, which are
    refused. `origin` names the sample in errors until its id is known. Raises SampleError with the dotted field, like
    `sample digits:12: messages[1].content[0].ref: ...`.
    """
    origin = origin or "?"
    values = load_object(raw, origin)
    # From here on errors name the sample by its id.
    sample_id = SampleFields(origin, "", values).text("id")
    top = _TopFields(sample_id, "", values)

    version = top.values.get("v")
    # True is an int for isinstance, and equals version 1.
    if type(version) is not int or version != SCHEMA_VERSION:
        top.fail("v", f"schema version {SCHEMA_VERSION} expected, got {version!r}")

    kind = top.choice("kind", KINDS)
    sample = Sample(
        id=top.sample_id,
        kind=kind,
        messages=top.messages() if kind == "chat" else (),
        content=_content(top, role=None) if kind == "doc" else (),
        tools=top.tools(),
        weight=top.number("weight", default=1.0, low=0.0, high=LARGEST_WEIGHT),
        task=top.optional_text("task"),
        meta=top.meta(),
    )
    top.check_image_indices(sample)
    return sample


def to_json(sample: Sample) -> str:
    """Write the sample as compact JSON of schema version 1; `parse_sample` reads it back equal.

    Raises ValueError for a number that JSON cannot hold.
    """
    document: dict[str, Any] = {"v": SCHEMA_VERSION, "id": sample.id, "kind": sample.kind}
    if sample.kind == "chat":
        document["messages"] = [_message_json(message) for message in sample.messages]
    else:
        document["content"] = [element_json(element) for element in sample.content]

    # What has its default is left out: it would stand in each of millions of samples.
    if sample.tools:
        document["tools"] = [dict(tool) for tool in sample.tools]
    if sample.weight != 1.0:
        document["weight"] = sample.weight
    if sample.task is not None:
        document["task"] = sample.task
    if sample.meta:
        document["meta"] = dict(sample.meta)

    # NaN and infinity are no JSON: other readers would refuse the whole sample.
    compact = (",", ":")
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=compact)


# ---- reading messages and the whole


class _TopFields(SampleFields):
    """The values of a whole sample."""

    def messages(self) -> tuple[Message, ...]:
        messages: list[Message] = []
        for index, value in enumerate(self.items("messages")):
            fields = SampleFields(self.sample_id, f"messages[{index}]", value)
            messages.append(self._message(fields, index))
        if not messages:
            self.fail("messages", "at least one message expected")
        return tuple(messages)

    def _message(self, fields: SampleFields, index: int) -> Message:
        role = fields.choice("role", ROLES)
        if role == "system" and index > 0:
            fields.fail("role", "a system message comes first or not at all")

        for name in fields.values.keys() - _MESSAGE_KEYS:
            # A long key is no mark, and the pattern takes its time for one.
            if len(name) <= LONGEST_KEY and LOSS_MARK.fullmatch(name):
                problem = "unknown mark of the loss: loss is the schema's word, a weight from 0"
                fields.fail(name, problem)
        return Message(role, _content(fields, role), fields.loss())

    def tools(self) -> tuple[Mapping[str, Any], ...]:
        if not self.has("tools"):
            return ()
        tools: list[Mapping[str, Any]] = []
        for index, tool in enumerate(self.items("tools")):
            fields = SampleFields(self.sample_id, f"tools[{index}]", tool)
            tools.append(fields.values)
        return tuple(tools)

    def check_image_indices(self, sample: Sample) -> None:
        """Fail for a box or point on a picture that the sample does not have."""
        placed = [element for element in sample.elements if isinstance(element, Box | Point)]
        count = len(sample.images) if placed else 0
        for element in placed:
            if element.image >= count:
                kind = type(element).__name__.lower()
                self.fail(
                    f"{kind}.image", f"picture {element.image} of {count} (they count from 0)"
                )

    def meta(self) -> Mapping[str, Any]:
        """Return the sample's `meta`, with the unknown top-level keys."""
        # Facts that a source has of its own are kept.
        unknown = {name: value for name, value in self.values.items() if name not in _TOP_KEYS}
        meta = self.values.get("meta")
        if meta is None:
            return unknown
        return unknown | dict(SampleFields(self.sample_id, "meta", meta).values)


def _content(fields: SampleFields, role: str | None) -> tuple[Element, ...]:
    """Read the elements of a message, or of a document, whose `role` is None."""
    # A message may be one text; a document is always a list.
    if role is not None and isinstance(fields.values.get("content"), str):
        return (Text(fields.values["content"]),)

    path = fields.at("content")
    elements: list[Element] = []
    for index, value in enumerate(fields.items("content")):
        place = _ElementFields(fields.sample_id, f"{path}[{index}]", value)
        elements.append(place.element(role))
    if not elements and role is None:
        fields.fail("content", "at least one element expected")

    # The template writes calls last; another order could not be rendered.
    for element, following in pairwise(elements):
        if isinstance(element, ToolCall) and not isinstance(following, ToolCall):
            fields.fail("content", "tool calls come last in a message")
    return tuple(elements)


# ---- reading elements


class _ElementFields(SampleFields):
    """The values of one element, which a method for each type reads."""

    def element(self, role: str | None) -> Element:
        """Read the element of a message with this role, or of a document (None)."""
        kind = self.choice("type", tuple(_READERS))
        if kind in ("think", "tool_call") and role != "assistant":
            self.fail("type", f"{kind} belongs to assistant messages only")
        return _READERS[kind](self)

    def plain_text(self) -> Text:
        return Text(self.text("text"), self.loss())

    def think(self) -> Think:
        return Think(self.text("text"), self.loss())

    def image(self) -> Image:
        return Image(
            self.ref("ref", self.get("ref")),
            self.integer("w", 1, LARGEST_SIDE),
            self.integer("h", 1, LARGEST_SIDE),
            self.optional_integer("min_pixels", 1, LARGEST_AREA),
            self.optional_integer("max_pixels", 1, LARGEST_AREA),
        )

    def video(self) -> Video:
        # Sizes first: all tokens of a video follow from them, without opening it.
        width = self.integer("w", 1, LARGEST_SIDE)
        height = self.integer("h", 1, LARGEST_SIDE)
        if "ref" in self.values:
            return self._video_file(width, height)

        names = self.items("frames")
        frames = tuple(self.ref(f"frames[{i}]", name) for i, name in enumerate(names))
        if not frames:
            self.fail("frames", "at least one frame expected")
        times = self._times(len(frames))
        return Video(frames, times, width, height, **self._part())

    def _video_file(self, width: int, height: int) -> Video:
        ref = self.ref("ref", self.get("ref"))
        count = self.integer("frames", 1, MOST_FRAMES)
        # A file of a constant rate has no times.
        times = self._times(count) if self.has("t") else ()
        return Video(
            frames=(),
            times=times,
            width=width,
            height=height,
            ref=ref,
            file_frames=count,
            fps=self.rate("fps"),
            duration=self.positive("duration"),
            **self._part(),
        )

    def _times(self, count: int) -> tuple[float, ...]:
        """Read the seconds of each of `count` frames."""
        times = self.numbers("t", low=0.0)
        if len(times) != count:
            self.fail("t", f"one time for each of the {count} frames expected, got {len(times)}")
        if any(later < earlier for earlier, later in pairwise(times)):
            self.fail("t", "times must not decrease")
        return times

    def _part(self) -> dict[str, Any]:
        """Read what narrows a video: the part that is shown, in seconds, and its own limits."""
        start = self.optional_number("start", low=0.0)
        end = self.optional_number("end", low=0.0)
        if start is not None and end is not None and end <= start:
            self.fail("end", f"after start ({start:g} s) expected, got {end:g}")
        return {
            "start": start,
            "end": end,
            "sample_fps": self.rate("sample_fps") if self.has("sample_fps") else None,
            "max_frames": self.optional_integer("max_frames", 1, LARGEST_AREA),
            "total_pixels": self.optional_integer("total_pixels", 1, LARGEST_AREA),
        }

    def box(self) -> Box:
        x1, y1, x2, y2 = xyxy = self._coordinates("xyxy", 4)
        # A box of no width is allowed: it may be one of a line.
        if x2 < x1 or y2 < y1:
            self.fail("xyxy", f"x1 <= x2 and y1 <= y2 expected, got {list(xyxy)}")
        return Box(
            self.integer("image", 0, MOST_IMAGES),
            (x1, y1, x2, y2),
            self._space(),
            self.optional_text("label"),
            self.loss(),
        )

    def point(self) -> Point:
        x, y = self._coordinates("xy", 2)
        return Point(
            self.integer("image", 0, MOST_IMAGES),
            (x, y),
            self._space(),
            self.optional_text("label"),
            self.loss(),
        )

    def _space(self) -> Space:
        return cast(Space, self.choice("space", SPACES, default="px"))

    def _coordinates(self, name: str, count: int) -> tuple[float, ...]:
        numbers = self.numbers(name, count)
        outside = any(not 0 <= number <= 1000 for number in numbers)
        if self._space() == "relative1000" and outside:
            expected = "numbers from 0 to 1000 expected in space relative1000"
            self.fail(name, f"{expected}, got {list(numbers)}")
        return numbers

    def time(self) -> Time:
        name = self.choice("fmt", TIME_FORMATS, default="seconds")
        time_format = cast(Literal["seconds", "hms"], name)
        return Time(self.number("t", low=0.0), time_format, self.loss())

    def tool_call(self) -> ToolCall:
        arguments = SampleFields(self.sample_id, self.at("arguments"), self.get("arguments"))
        # Their own contents are the tool's affair.
        return ToolCall(self.text("name"), arguments.values, self.loss())


_READERS: Final[dict[str, Callable[[_ElementFields], Element]]] = {
    "text": _ElementFields.plain_text,
    "image": _ElementFields.image,
    "video": _ElementFields.video,
    "box": _ElementFields.box,
    "point": _ElementFields.point,
    "time": _ElementFields.time,
    "think": _ElementFields.think,
    "tool_call": _ElementFields.tool_call,
}


# ---- writing


def _message_json(message: Message) -> dict[str, Any]:
    values: dict[str, Any] = {"role": message.role}
    if message.loss is not None:
        values["loss"] = message.loss
    values["content"] = [element_json(element) for element in message.content]
    return values


def element_json(element: Element) -> dict[str, Any]:
    """Return an element as the JSON object of the schema."""
    values = _type_json(element)
    values["label"] = getattr(element, "label", None)
    values["loss"] = getattr(element, "loss", None)
    # An option that is not given would take bytes in each of millions of samples.
    return {name: value for name, value in values.items() if value is not None}


def _type_json(element: Element) -> dict[str, Any]:
    """Return the keys that only an element's own type has; None where an option is not given."""
    match element:
        case Text(text):
            return {"type": "text", "text": text}
        case Think(text):
            return {"type": "think", "text": text}
        case Time(seconds, name):
            return {"type": "time", "t": seconds, "fmt": name}
        case ToolCall(name, arguments):
            return {"type": "tool_call", "name": name, "arguments": dict(arguments)}
        case Box(image, xyxy, space):
            return {"type": "box", "image": image, "xyxy": list(xyxy), "space": space}
        case Point(image, xy, space):
            return {"type": "point", "image": image, "xy": list(xy), "space": space}
        case Image(ref, width, height):
            values = {"type": "image", "ref": ref, "w": width, "h": height}
            return values | {"min_pixels": element.min_pixels, "max_pixels": element.max_pixels}
        case Video():
            return _video_json(element)


def _video_json(video: Video) -> dict[str, Any]:
    values: dict[str, Any] = {"type": "video"}
    if video.ref is None:
        values["frames"] = list(video.frames)
    else:
        values["ref"] = video.ref
        values["frames"] = video.file_frames
        values["fps"] = video.fps
        values["duration"] = video.duration
    if video.times:
        values["t"] = list(video.times)

    values |= {"w": video.width, "h": video.height}
    for name in ("start", "end", "sample_fps", "max_frames", "total_pixels"):
        values[name] = getattr(video, name)
    return values
