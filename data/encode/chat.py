"""From a sample to the string that the model reads: ChatML, pictures, videos, boxes and times, with loss weights.

A rendering is a list of pieces. Text pieces that touch each other are tokenised as one string, exactly as if the whole
prompt were tokenised at once; special pieces are placed by id. Only what an assistant says is tokenised apart from the header
before it: an answer that begins with a newline would share a token with the header's, which no server's prompt ends with. Source: the
chat template that ships with the Qwen3-VL Instruct models (5,292 bytes, SHA-256 3636d0f0...89e4), tools included, and for videos the
format of their training (a timestamp and its own vision block for each temporal patch, no outer wrapper). The thinking format is that
of the Thinking models' template (thinking.py); `instruct` writes thoughts where a sample has them, in every turn.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from visionloom.common.errors import UserError
from visionloom.data.config import INSTRUCT, THINKING, MediaConfig
from visionloom.data.encode.geometry import (
    Grid,
    image_grid,
    scale_coordinate,
    tokens_per_frame,
    video_layout,
)
from visionloom.data.encode.thinking import begins_with_thought, thinking_turns
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

TEMPLATE_VERSIONS: Final = {INSTRUCT: 3, THINKING: 1001}
"""Count changes of what this file renders in a format: length tables made by another version are not used."""
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
    """Pieces up to where a server's prompt ends that waits for the last assistant turn; 0 if there is none."""
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


def render(sample: Sample, rules: MediaConfig, chat_format: str = INSTRUCT) -> Rendering:
    """Render a sample; weights are those of its elements times the sample's own.

    Loss lies on what assistants say and on its `<|im_end|>`, or on all text of a document and its `<|endoftext|>`;
    never on headers, tools, their results, pictures, videos or timestamps. `chat_format`: see data.chat_format. Raises
    SampleError for a picture without a valid size, and for a box outside the sample's pictures.
    """
    try:
        return _Renderer(sample, rules, chat_format).whole()
    except RecursionError:
        raise SampleError(sample.id, "", "its tools or calls are nested too deeply") from None


class _Renderer:
    """Adds the parts of one sample to its rendering, in reading order."""

    def __init__(self, sample: Sample, rules: MediaConfig, chat_format: str) -> None:
        self.sample, self.rules, self.thinks = sample, rules, chat_format == THINKING
        self.out = Rendering(images=sample.images)

    def whole(self) -> Rendering:
        """Render the sample from its first to its last piece."""
        sample, messages = self.sample, self.sample.messages
        if sample.tools:
            # the sample's own system message goes into the turn that lists the tools
            system = messages[:1] if messages and messages[0].role == "system" else ()
            self.tools(system)
            messages = messages[len(system) :]
        self.turns(messages)

        for element in sample.content:
            self.element(element, element_loss(element) * sample.weight)
        if sample.kind == "doc":
            self.out.add(END_OF_TEXT, sample.weight, count=1)
        return self.out

    def turns(self, messages: Sequence[Message]) -> None:
        """Render a conversation; results of tools that follow each other share a turn."""
        messages = thinking_turns(messages) if self.thinks else messages
        spoken = [place for place, message in enumerate(messages) if message.role == "assistant"]
        answer = max(spoken, default=-1)
        # one more on each side, so that every message has neighbours
        roles = [None, *(message.role for message in messages), None]
        for place, message in enumerate(messages):
            if message.role == "tool":
                self.result(message, roles[place] != "tool", roles[place + 2] != "tool")
            else:
                self.message(message, is_answer=place == answer)

    def tools(self, system: tuple[Message, ...]) -> None:
        """Render the system turn that lists the tools, after what the sample's own system message says."""
        add = self.out.add
        add(TURN_START, count=1)
        add("system\n")
        for message in system:
            self.elements(message)
            add("\n\n")
        add(_TOOLS_BEGIN)
        for tool in self.sample.tools:
            add("\n" + json.dumps(tool, ensure_ascii=False))
        add(_TOOLS_END)

        # the marks are special tokens also where the text only speaks of them, as in the published template
        add(CALL_START, count=1)
        add(CALL_END, count=1)
        add(" XML tags:\n")
        add(CALL_START, count=1)
        add(_CALL_FORM)
        add(CALL_END, count=1)
        add(TURN_END, count=1)
        add("\n")

    def result(self, message: Message, first: bool, last: bool) -> None:
        """Render what a tool returned; results that follow each other, the first to the last, share one user turn."""
        add = self.out.add
        if first:
            add(TURN_START, count=1)
            add("user")
        add("\n")
        add(RESPONSE_START, count=1)
        add("\n")
        self.elements(message)
        add("\n")
        add(RESPONSE_END, count=1)
        if last:
            add(TURN_END, self.end_weight(message), count=1)
            add("\n")

    def message(self, message: Message, is_answer: bool) -> None:
        """Render a turn; `is_answer`: it is the last of the assistant."""
        out = self.out
        out.add(TURN_START, count=1)
        out.add(f"{message.role}\n")
        start = len(out.pieces)
        is_opened = message.role == "assistant" and self.begin_answer(message)
        self.speech(message, is_opened)
        # what a thinking model never writes is no answer of its
        if is_answer and is_opened == self.thinks:
            out.prompt_pieces = out.prompt_end
            out.answer = _text_of(out.pieces[start:])
        out.add(TURN_END, self.end_weight(message), count=1)
        out.add("\n")

    def begin_answer(self, message: Message) -> bool:
        """Render what a server's prompt has of an answer, and end the prompt; return whether a thought has begun."""
        is_opened = self.thinks and begins_with_thought(message)
        if is_opened:
            self.out.add(THINK_START, count=1)
            self.out.add("\n")
        self.out.end_prompt()
        return is_opened

    def speech(self, message: Message, is_opened: bool) -> None:
        """Render the elements of a turn, in which every call begins a line of its own; `is_opened`: its thought has begun."""
        spoken = False
        for element in message.content:
            weight = element_loss(element, message) * self.sample.weight
            if is_opened and isinstance(element, Think):
                self.end_thought(f"{element.text}\n", weight)
                is_opened = False
                continue
            # but for a call that begins the turn
            if isinstance(element, ToolCall) and spoken:
                self.out.add("\n", weight)
            spoken = spoken or not isinstance(element, Think)
            self.element(element, weight)

    def end_weight(self, message: Message) -> float:
        """Return the weight of the mark that ends a turn: of the message's own loss, or 1 for the assistant's."""
        default = 1.0 if message.role == "assistant" else 0.0
        loss = default if message.loss is None else message.loss
        return loss * self.sample.weight

    def elements(self, message: Message) -> None:
        """Render the elements of a message, each with its own loss times the sample's weight."""
        for element in message.content:
            self.element(element, element_loss(element, message) * self.sample.weight)

    def element(self, element: Element, weight: float) -> None:
        """Render an element with a weight that its kind may use."""
        add = self.out.add
        match element:
            case Image() | Video():
                self.media(element)
            case Think():
                add(THINK_START, weight, count=1)
                self.end_thought(f"\n{element.text}\n", weight)
            case ToolCall():
                arguments = json.dumps(element.arguments, ensure_ascii=False)
                call = f'{{"name": "{element.name}", "arguments": {arguments}}}'
                self.marked(CALL_START, call, CALL_END, weight)
            case _:
                add(self.plain_text(element), weight)

    def end_thought(self, text: str, weight: float) -> None:
        """Add the text of a thought, its end and the newlines before what is said."""
        self.out.add(text, weight)
        self.out.add(THINK_END, weight, count=1)
        self.out.add("\n\n", weight)

    def marked(self, begin: str, text: str, end: str, weight: float) -> None:
        """Add text on lines of its own between two special tokens."""
        self.out.add(begin, weight, count=1)
        self.out.add(f"\n{text}\n", weight)
        self.out.add(end, weight, count=1)

    def plain_text(self, element: Text | Box | Point | Time) -> str:
        """Return how an element without special tokens is spelled."""
        match element:
            case Text():
                return element.text
            case Box():
                return self.grounding(element, "bbox_2d", element.xyxy)
            case Point():
                return self.grounding(element, "point_2d", element.xy)
            case Time():
                write = timestamp if element.format == "seconds" else clock
                return write(element.seconds)

    def media(self, media: Image | Video) -> None:
        """Add a block of placeholders for a picture, or one for each temporal patch of a video after its time."""
        grid, moments = self.layout_of(media)
        tokens = tokens_per_frame(grid)
        self.out.visual_tokens += grid[0] * tokens
        # before any string of that length is made
        if self.out.visual_tokens > MOST_VISUAL_TOKENS:
            problem = f"more than {MOST_VISUAL_TOKENS} visual tokens"
            raise SampleError(self.sample.id, "", problem)
        self.out.media.append(media)
        self.out.grids.append(grid)
        if isinstance(media, Image):
            self.vision_block(IMAGE, tokens)
        for seconds in moments:
            self.out.add(timestamp(seconds))
            self.vision_block(VIDEO, tokens)

    def layout_of(self, media: Image | Video) -> tuple[Grid, list[float]]:
        """Return the grid of a picture or video, and the seconds of a video's temporal patches."""
        try:
            if isinstance(media, Image):
                return image_grid(media, self.rules), []
            return video_layout(media, self.rules)
        except UserError as error:
            name = media.ref if isinstance(media, Image) else media.refs[0]
            raise SampleError(self.sample.id, name, str(error)) from None

    def vision_block(self, token: str, count: int) -> None:
        """Add placeholders between their marks."""
        self.out.add(VISION_START, count=1)
        self.out.add(token, count=count)
        self.out.add(VISION_END, count=1)

    def grounding(
        self,
        element: Box | Point,
        key: str,
        values: tuple[float, ...],
    ) -> str:
        """Write a box or point as the JSON of Qwen3-VL, its coordinates in thousandths of its picture's sides."""
        image = self.image_of(element, key)
        # x and y in turn: two values of a point, four of a box
        sides = (image.width, image.height) * 2
        numbers = []
        for value, side in zip(values, sides, strict=False):
            numbers.append(scale_coordinate(value, side, element.space))
        label = {} if element.label is None else {"label": element.label}
        return json.dumps({key: numbers, **label}, ensure_ascii=False)

    def image_of(self, element: Box | Point, key: str) -> Image:
        """Return the picture that a box or point is on; raises SampleError if there is none."""
        images = self.out.images
        if element.image >= len(images):
            problem = f"image {element.image} expected, the sample has {len(images)}"
            raise SampleError(self.sample.id, key, problem)
        return images[element.image]


def timestamp(seconds: float) -> str:
    """Write a moment as `<12.5 seconds>`."""
    return f"<{seconds:.1f} seconds>"


def clock(seconds: float) -> str:
    """Write a moment as hours, minutes and seconds: `<0:02:03.4>`."""
    # in whole tenths, so that 59.96 s becomes 1:00.0 and not 0:60.0
    minutes, tenths = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    return f"<{hours}:{minutes:02d}:{tenths // 10:02d}.{tenths % 10}>"
