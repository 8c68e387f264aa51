"""The types of a training sample, schema version 1; `sample_json` has their JSON form and its checks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from visionloom.common.errors import UserError

SCHEMA_VERSION: Final = 1
KINDS: Final = ("chat", "doc")
ROLES: Final = ("system", "user", "assistant", "tool")
SPACES: Final = ("px", "relative1000")
TIME_FORMATS: Final = ("seconds", "hms")

Space = Literal["px", "relative1000"]


class SampleError(UserError):
    """One sample is at fault: the message names the sample and the dotted field."""

    def __init__(self, sample_id: str, where: str, problem: str) -> None:
        place = f"sample {sample_id}: {where}" if where else f"sample {sample_id}"
        super().__init__(f"{place}: {problem}")
        self.sample_id, self.where, self.problem = sample_id, where, problem

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str, str]]:
        # Exceptions are pickled by their message alone otherwise; workers send this one.
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
        """Return the names of its media members."""
        return self.frames if self.ref is None else (self.ref,)

    @property
    def frame_count(self) -> int:
        """Return the number of frames stored, before sampling."""
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
    """A moment of a video in seconds, and how it is written."""

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
        """Return all elements in reading order."""
        if self.content:
            return self.content
        return tuple(element for message in self.messages for element in message.content)

    @property
    def images(self) -> tuple[Image, ...]:
        """Return the pictures in reading order, which `Box.image` counts."""
        return tuple(element for element in self.elements if isinstance(element, Image))

    @property
    def refs(self) -> tuple[str, ...]:
        """Return the names of all media members in reading order, each once."""
        names = (name for element in self.elements for name in media_refs(element))
        # A dictionary keeps the order of reading; a set would not.
        return tuple(dict.fromkeys(names))


def element_loss(element: Element, message: Message | None = None) -> float:
    """Return the weight of an element's tokens in the loss: its own, else its message's, else 1 for assistants and documents.

    `message` is None inside a document. Pictures and videos weigh 0: visual tokens are never predicted.
    """
    # Visual tokens are inputs only.
    if isinstance(element, Image | Video):
        return 0.0
    if element.loss is not None:
        return element.loss
    if message is not None and message.loss is not None:
        return message.loss
    return 1.0 if message is None or message.role == "assistant" else 0.0


def media_refs(element: Element) -> tuple[str, ...]:
    """Return the names of an element's media members, in order."""
    if isinstance(element, Image):
        return (element.ref,)
    return element.refs if isinstance(element, Video) else ()
