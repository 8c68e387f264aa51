"""From a sample to the string that the model reads: ChatML, pictures, videos, boxes and times, with loss weights.

A rendering is a list of pieces. Text pieces that touch each other are tokenised as one string, exactly as if the whole
prompt were tokenised at once; special pieces are placed by id. Only what an assistant says is tokenised apart from the header
before it: an answer that begins with a newline would share a token with the header's, which no server's prompt ends with. Source: the chat template that ships with the Qwen3-VL
Instruct models (5,292 bytes, SHA-256 3636d0f0...89e4), tools included, and for videos the format of their training (a
timestamp and its own vision block for each temporal patch, no outer wrapper).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from visionloom.common.errors import UserError
from visionloom.data.config import MediaConfig
from visionloom.data.encode.geometry import (
    Grid,
    image_grid,
    scale_coordinate,
    tokens_per_frame,
    video_layout,
)
from visionloom.data.encode.tokenizer import (
    CALL_END,
    CALL_START,
    END_OF_TEXT,
    IMAGE,
    RESPONSE_END,
    RESPONSE_START,
    THINK_END,
    THINK_START,
    TURN_END,
    TURN_START,
    VIDEO,
    VISION_END,
    VISION_START,
)
from visionloom.data.shards.sample import (
    Box,
    Element,
    Image,
    Message,
    Point,
    Sample,
    SampleError,
    Text,
    Think,
    Time,
    ToolCall,
    Video,
    element_loss,
)

TEMPLATE_VERSION: Final = 3
"""Counts changes of what this file renders: length tables made by another version are not used."""
MOST_VISUAL_TOKENS: Final = 1 << 22
"""Of a sample: 16 of the longest packs (262,144 tokens); sixty bytes of JSON can ask for 16,384."""
_TOOLS_BEGIN: Final = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_END: Final = "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
_CALL_FORM: Final = '\n{"name": <function-name>, "arguments": <args-json-object>}\n'


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of plain text, or `count` times one special token; `weight` is each token's weight in the loss."""

    text: str
    weight: float = 0.0
    count: int = 0
    """0 for plain text."""
    apart: bool = False
    """Tokenised apart from the text before it."""


@dataclass(slots=True)
class Rendering:
    """A sample as pieces, with the pictures and videos they show, in order."""

    pieces: list[Piece] = field(default_factory=list)
    media: list[Image | Video] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    prompt_end: int = -1
    """Pieces before the answer that comes next; -1: none is to come."""
    prompt_pieces: int = 0
    """Pieces up to and including the header of the last assistant turn; 0 if there is none."""
    images: tuple[Image, ...] = ()
    """The sample's pictures, which boxes count."""
    visual_tokens: int = 0
    answer: str | None = None
    """What the last assistant turn says, without its end mark."""

    def add(self, text: str, weight: float = 0.0, count: int = 0) -> None:
        """Append a piece; empty text adds nothing."""
        if text:
            self.pieces.append(
                Piece(text, weight, count, apart=len(self.pieces) == self.prompt_end)
            )

    def end_prompt(self) -> None:
        """Let what an assistant says be tokenised by itself, as a model writes it after the prompt of a server."""
        self.prompt_end = len(self.pieces)

    @property
    def text(self) -> str:
        """Return the whole string that the model reads."""
        return _text_of(self.pieces)


def _text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text * max(1, piece.count) for piece in pieces)


def render(sample: Sample, rules: MediaConfig) -> Rendering:
    """Render a sample; weights are those of its elements times the sample's own.

    Loss lies on what assistants say and on its `<|im_end|>`, or on all text of a document and its `<|endoftext|>`;
    never on headers, tools, their results, pictures, videos or timestamps. Raises SampleError for a picture without a valid
    size, and for a box outside the sample's pictures.
    """
    try:
        return _rendered(sample, rules)
    except RecursionError:
        raise SampleError(sample.id, "", "its tools or calls are nested too deeply") from None


def _rendered(sample: Sample, rules: MediaConfig) -> Rendering:
    rendering, messages = Rendering(images=sample.images), sample.messages
    if sample.tools:
        # the sample's own system message goes into the turn that lists the tools
        system = messages[:1] if messages and messages[0].role == "system" else ()
        _render_tools(rendering, sample, system, rules)
        messages = messages[len(system) :]

    spoken = [place for place, message in enumerate(messages) if message.role == "assistant"]
    answer = max(spoken, default=-1)
    # one more on each side, so that every message has neighbours
    roles = [None, *(message.role for message in messages), None]
    for place, message in enumerate(messages):
        if message.role == "tool":
            ends = roles[place] != "tool", roles[place + 2] != "tool"
            _render_result(rendering, sample, message, rules, ends)
        else:
            _render_message(rendering, sample, message, rules, is_answer=place == answer)

    for element in sample.content:
        _render_element(rendering, sample, element, element_loss(element) * sample.weight, rules)
    if sample.kind == "doc":
        rendering.add(END_OF_TEXT, sample.weight, count=1)
    return rendering


def _render_tools(
    rendering: Rendering, sample: Sample, system: tuple[Message, ...], rules: MediaConfig
) -> None:
    """Render the system turn that lists the tools, after what the sample's own system message says."""
    rendering.add(TURN_START, count=1)
    rendering.add("system\n")
    for message in system:
        _render_elements(rendering, sample, message, rules)
        rendering.add("\n\n")
    rendering.add(_TOOLS_BEGIN)
    for tool in sample.tools:
        rendering.add("\n" + json.dumps(tool, ensure_ascii=False))
    rendering.add(_TOOLS_END)

    # the marks are special tokens also where the text only speaks of them, as in the published template
    rendering.add(CALL_START, count=1)
    rendering.add(CALL_END, count=1)
    rendering.add(" XML tags:\n")
    rendering.add(CALL_START, count=1)
    rendering.add(_CALL_FORM)
    rendering.add(CALL_END, count=1)
    rendering.add(TURN_END, count=1)
    rendering.add("\n")


def _render_elements(
    rendering: Rendering, sample: Sample, message: Message, rules: MediaConfig
) -> None:
    """Render the elements of a message, each with its own loss times the sample's weight."""
    for element in message.content:
        weight = element_loss(element, message) * sample.weight
        _render_element(rendering, sample, element, weight, rules)


def _render_result(
    rendering: Rendering,
    sample: Sample,
    message: Message,
    rules: MediaConfig,
    ends: tuple[bool, bool],
) -> None:
    """Render what a tool returned; results that follow each other share one user turn.

    `ends`: whether it is the first and the last one of its turn.
    """
    first, last = ends
    if first:
        rendering.add(TURN_START, count=1)
        rendering.add("user")
    rendering.add("\n")
    rendering.add(RESPONSE_START, count=1)
    rendering.add("\n")
    _render_elements(rendering, sample, message, rules)
    rendering.add("\n")
    rendering.add(RESPONSE_END, count=1)
    if last:
        rendering.add(TURN_END, _end_weight(message) * sample.weight, count=1)
        rendering.add("\n")


def _render_message(
    rendering: Rendering, sample: Sample, message: Message, rules: MediaConfig, is_answer: bool
) -> None:
    """Render a turn; `is_answer`: it is the last of the assistant."""
    rendering.add(TURN_START, count=1)
    rendering.add(f"{message.role}\n")
    start = len(rendering.pieces)
    if message.role == "assistant":
        rendering.end_prompt()
    spoken = False
    for element in message.content:
        weight = element_loss(element, message) * sample.weight
        # a call begins a line of its own, but for one that begins the turn
        if isinstance(element, ToolCall) and spoken:
            rendering.add("\n", weight)
        spoken = spoken or not isinstance(element, Think)
        _render_element(rendering, sample, element, weight, rules)

    if is_answer:
        rendering.prompt_pieces = start
        rendering.answer = _text_of(rendering.pieces[start:])
    rendering.add(TURN_END, _end_weight(message) * sample.weight, count=1)
    rendering.add("\n")


def _end_weight(message: Message) -> float:
    default = 1.0 if message.role == "assistant" else 0.0
    return default if message.loss is None else message.loss


def _render_element(
    rendering: Rendering, sample: Sample, element: Element, weight: float, rules: MediaConfig
) -> None:
    match element:
        case Text():
            rendering.add(element.text, weight)
        case Image() | Video():
            _render_media(rendering, sample, element, rules)
        case Think():
            rendering.add(THINK_START, weight, count=1)
            rendering.add(f"\n{element.text}\n", weight)
            rendering.add(THINK_END, weight, count=1)
            rendering.add("\n\n", weight)
        case ToolCall():
            arguments = json.dumps(element.arguments, ensure_ascii=False)
            rendering.add(CALL_START, weight, count=1)
            rendering.add(f'\n{{"name": "{element.name}", "arguments": {arguments}}}\n', weight)
            rendering.add(CALL_END, weight, count=1)
        case Box():
            rendering.add(_grounding(rendering, sample, element, "bbox_2d", element.xyxy), weight)
        case Point():
            rendering.add(_grounding(rendering, sample, element, "point_2d", element.xy), weight)
        case Time():
            write = timestamp if element.format == "seconds" else clock
            rendering.add(write(element.seconds), weight)


def _render_media(
    rendering: Rendering, sample: Sample, media: Image | Video, rules: MediaConfig
) -> None:
    """Add a block of placeholders for a picture, or one for each temporal patch of a video after its time."""
    try:
        if isinstance(media, Image):
            grid, moments = image_grid(media, rules), list[float]()
        else:
            grid, moments = video_layout(media, rules)
    except UserError as error:
        name = media.ref if isinstance(media, Image) else media.refs[0]
        raise SampleError(sample.id, name, str(error)) from None

    tokens = tokens_per_frame(grid)
    rendering.visual_tokens += grid[0] * tokens
    # before any string of that length is made
    if rendering.visual_tokens > MOST_VISUAL_TOKENS:
        raise SampleError(sample.id, "", f"more than {MOST_VISUAL_TOKENS} visual tokens")
    rendering.media.append(media)
    rendering.grids.append(grid)
    if isinstance(media, Image):
        _add_vision_block(rendering, IMAGE, tokens)
    for seconds in moments:
        rendering.add(timestamp(seconds))
        _add_vision_block(rendering, VIDEO, tokens)


def _add_vision_block(rendering: Rendering, token: str, count: int) -> None:
    rendering.add(VISION_START, count=1)
    rendering.add(token, count=count)
    rendering.add(VISION_END, count=1)


def timestamp(seconds: float) -> str:
    """Write a moment as `<12.5 seconds>`."""
    return f"<{seconds:.1f} seconds>"


def clock(seconds: float) -> str:
    """Write a moment as hours, minutes and seconds: `<0:02:03.4>`."""
    # in whole tenths, so that 59.96 s becomes 1:00.0 and not 0:60.0
    minutes, tenths = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    return f"<{hours}:{minutes:02d}:{tenths // 10:02d}.{tenths % 10}>"


def _grounding(
    rendering: Rendering,
    sample: Sample,
    element: Box | Point,
    key: str,
    values: tuple[float, ...],
) -> str:
    """Write a box or point as the JSON of Qwen3-VL, its coordinates in thousandths of its picture's sides."""
    images = rendering.images
    if element.image >= len(images):
        problem = f"image {element.image} expected, the sample has {len(images)}"
        raise SampleError(sample.id, key, problem)
    image = images[element.image]
    # x and y in turn: two values of a point, four of a box
    sides = (image.width, image.height) * 2
    numbers = []
    for value, side in zip(values, sides, strict=False):
        numbers.append(scale_coordinate(value, side, element.space))
    label = {} if element.label is None else {"label": element.label}
    return json.dumps({key: numbers, **label}, ensure_ascii=False)
