"""Generated answers to held-out questions, with the question and the right answer, as people read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.scores import is_right
from visionloom.data.encode.tokenizer import (
    IMAGE,
    TURN_START,
    VIDEO,
    VISION_END,
    VISION_START,
    Tokenizer,
)

PICTURE: Final = "\ufffc"
"""Stands for a picture, or for the two frames of a video's temporal patch, in the text of a question."""


@dataclass(frozen=True)
class Prediction:
    """One generated answer."""

    sample: EncodedSample
    text: str
    """The generated text, without its end token."""
    question: str
    """The prompt as a person reads it; see `question_text`."""
    score: str = "default"
    """By which the answer is right or wrong: data.validation.NAME.score."""

    @property
    def correct(self) -> bool:
        """Return whether the answer is right; see `scores.is_right`."""
        return is_right(self.text, self.sample.answer or "", self.score)


def answer_text(token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of an answer, with what of it the prompt had already and without the token that ended it."""
    kept = [token for token in token_ids if token not in tokenizer.stop_ids]
    return tokenizer.answer_start + tokenizer.decode(kept)


def question_text(sample: EncodedSample, tokenizer: Tokenizer) -> str:
    """Return the prompt as a person reads it, with PICTURE in the place of each picture or pair of video frames."""
    roles = {tokenizer.special(token): PICTURE for token in (IMAGE, VIDEO)}
    roles |= {tokenizer.special(token): "" for token in (VISION_START, VISION_END)}
    roles[tokenizer.special(TURN_START)] = TURN_START

    turns = [""]
    prompt = sample.input_ids[: sample.prompt_length].tolist()
    for role, group in groupby(prompt, key=roles.get):
        if role == TURN_START:
            turns.append("")
        elif role is not None:
            turns[-1] += role
        else:
            turns[-1] += tokenizer.decode(list(group)).replace(PICTURE, "")

    # the last turn is the header of the answer
    document, *chat, _ = turns
    speeches = []
    for turn in chat:
        role, _, text = turn.partition("\n")
        if text.strip():
            speeches.append((role.strip(), text.strip()))
    if len(speeches) == 1:
        parts = [text for _, text in speeches]
    else:
        parts = [f"{role}: {text}" for role, text in speeches]
    return "\n".join([document.strip(), *parts]).strip()
