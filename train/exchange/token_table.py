"""The tokens of a tokenizer folder and their ids, without building a tokenizer. Nothing here imports torch."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field
from tokenizers import Tokenizer as Backend

from visionloom.common.errors import UserError
from visionloom.common.text import one_line
from visionloom.data.encode.tokenizer import END_OF_TEXT, TURN_END
from visionloom.model.huggingface.config import (
    LARGEST_TABLE,
    as_type,
    parse_object,
    read_file,
    read_json,
)

TOKENIZER: Final = "tokenizer.json"
SETTINGS: Final = "tokenizer_config.json"
LONGEST: Final = 300
"""Characters of a library's words for a fault that an error repeats."""
GROWING: Final = ("Replace", "Prepend", "Precompiled")
"""Steps of normalizers that may double a text: thirty in a row make 2^30 letters of one."""
STOPS: Final = (TURN_END, END_OF_TEXT)
"""Tokens that end an answer; the last also pads."""
PROBE: Final = (
    "It's 12.5 seconds (№ 3):\r\n\r\n\tdef f(x_1):  return  x_1 ** 2  # cafe\u0301 naïve 你好 世界 こんにちは Привет 😀"
    ' {"bbox_2d": [12, 345, 678, 999], "label": "don\'t"}   \n\n<0.5 seconds>?! $\\frac{a}{b}$ WE\'LL 1234567890'
)
"""Text that any two tokenizers are likely to cut differently: contractions, digits, white space, marks, scripts, signs."""


def _growing(normalizer: Any) -> str:
    """Return the type of the first of a normalizer's steps that may make text longer; empty if there is none."""
    # A list and no recursion: a stranger decides how deep the steps are nested.
    left = [normalizer]
    while left:
        step = left.pop()
        if isinstance(step, dict):
            if step.get("type") in GROWING:
                return str(step["type"])
            left += step.values()
        elif isinstance(step, list):
            left += step
    return ""


Id = Annotated[int, Field(ge=0, lt=1 << 31)]


@dataclass(frozen=True)
class _Added:
    """Content and id of an added token."""

    content: str
    id: Id


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a tokenizer.json and their ids."""

    folder: Path
    name: str
    """How a message calls it: `data.tokenizer=DIR`."""
    hash: str
    """SHA-256 of the file."""
    ids: dict[str, int]
    """Every token, the added ones among them."""
    added: dict[str, int]
    """Added tokens: special ones, and words that are never cut."""
    settings: dict[str, Any]
    """tokenizer_config.json; empty if there is none."""

    @classmethod
    def read(cls, folder: Path, option: str) -> "TokenTable":
        """Read a folder's tokenizer.json; UserError naming `option` if it is missing or damaged."""
        path = folder / TOKENIZER
        if not path.exists():
            raise UserError(
                f"{option}={folder}: no {TOKENIZER} there: give the folder of a fast Hugging Face tokenizer"
            )
        raw = read_file(path, option, LARGEST_TABLE)
        content = parse_object(raw, path, option)
        if growing := _growing(content.get("normalizer")):
            raise UserError(
                f"{option}={folder}: {TOKENIZER} has a normalizer of type {growing}, which can make a text endless: take Qwen's"
            )
        added = _added_tokens(content, path, option)
        words = _vocabulary(content, path, option)
        settings = read_json(folder / SETTINGS, option) if (folder / SETTINGS).exists() else {}
        return cls(
            folder=folder,
            name=f"{option}={folder}",
            hash=hashlib.sha256(raw).hexdigest(),
            ids=words | added,
            added=added,
            settings=settings,
        )

    @property
    def last(self) -> tuple[str, int]:
        """Return the token with the highest id, and the id."""
        return max(self.ids.items(), key=lambda entry: entry[1], default=("none", -1))

    def differences(self, other: "TokenTable") -> Iterator[str]:
        """Yield a phrase for the first difference of two tokenizers: ids of a token, or how they cut a text."""
        if self.hash == other.hash:
            return
        difference = self._id_difference(other) or self._row_difference(other)
        if difference:
            yield difference
            return

        # The same tokens may still be put together by other rules.
        mine, theirs = self.cut(PROBE), other.cut(PROBE)
        for place, (here, there) in enumerate(zip_longest(mine, theirs)):
            if here != there:
                end = place + 3
                yield f"the same text is cut as {mine[place:end]} here and as {theirs[place:end]} there"
                return

    def _id_difference(self, other: "TokenTable") -> str:
        """Return a phrase for tokens that have other ids in `other`; empty without."""
        changed = []
        for token, here in self.ids.items():
            there = other.ids.get(token, here)
            if there != here:
                changed.append((here, there, token))
        if not changed:
            return ""
        more = f", and {len(changed) - 1} more tokens differ" if len(changed) > 1 else ""
        here, there, token = min(changed)
        return f"{token} is {here} here and {there} there{more}"

    def _row_difference(self, other: "TokenTable") -> str:
        """Return a phrase for ids that stand for other tokens in `other`: rows trained as these; empty without."""
        rows = {number: token for token, number in other.ids.items()}
        renamed = []
        for token, number in self.ids.items():
            if token not in other.ids and number in rows:
                renamed.append((number, token))
        if not renamed:
            return ""
        more = f", and {len(renamed) - 1} more ids differ" if len(renamed) > 1 else ""
        number, token = min(renamed)
        return f"{number} is {token} here and {rows[number]} there{more}"

    def cut(self, text: str) -> list[str]:
        """Return the tokens of a text; UserError if the file is no tokenizer."""
        content = read_file(self.folder / TOKENIZER, self.name.partition("=")[0], LARGEST_TABLE)
        try:
            tokens: list[str] = Backend.from_str(content.decode()).encode(text).tokens
        # The library raises bare Exception, and where it panics no Exception at all.
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(
                f"{self.name}: {TOKENIZER} cannot be read: {one_line(str(error))[:LONGEST]}"
            ) from None
        return tokens


def _added_tokens(content: dict[str, Any], path: Path, option: str) -> dict[str, int]:
    """Return the ids of a tokenizer.json's added tokens; UserError if they are of another form."""
    where = "added_tokens"
    tokens = as_type(content.get(where) or [], list[dict[str, Any]], path, option, where)
    wanted = [{key: token.get(key) for key in ("content", "id")} for token in tokens]
    typed = as_type(wanted, list[_Added], path, option, where)
    return {token.content: token.id for token in typed}


def _vocabulary(content: dict[str, Any], path: Path, option: str) -> dict[str, int]:
    """Return the ids of a tokenizer.json's words; UserError if they are of another form."""
    model = as_type(content.get("model"), dict[str, Any], path, option, "model")
    # Words with ids, or, of a unigram model, pairs of word and score in the order of ids.
    form: Any = dict[str, Id] | list[tuple[str, float]]
    words = as_type(model.get("vocab"), form, path, option, "model.vocab")
    if isinstance(words, dict):
        return words
    return {word: number for number, (word, _) in enumerate(words)}
