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
"""Steps of normalizers by which thirty in a row make 2^30 letters of one."""
STOPS: Final = (TURN_END, END_OF_TEXT)
"""Tokens that end an answer; the last also pads."""
PROBE: Final = (
    "It's 12.5 seconds (№ 3):\r\n\r\n\tdef f(x_1):  return  x_1 ** 2  # cafe\u0301 naïve 你好 世界 こんにちは Привет 😀"
    ' {"bbox_2d": [12, 345, 678, 999], "label": "don\'t"}   \n\n<0.5 seconds>?! $\\frac{a}{b}$ WE\'LL 1234567890'
)
"""What any two tokenizers are likely to cut differently: contractions, digits, white space, marks, scripts, signs."""


def _growing(normalizer: Any) -> str:
    """The type of a step that replaces text by longer text, which others in a row multiply; empty if there is none."""
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
    """An added token, as far as it counts here."""

    content: str
    id: Id


@dataclass(frozen=True)
class TokenTable:
    """What a tokenizer.json holds."""

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
        """Read a folder's tokenizer.json; UserError naming `option` if there is none or it is damaged."""
        path = folder / TOKENIZER
        if not path.exists():
            raise UserError(
                f"{option}={folder}: no {TOKENIZER} there: give the folder of a fast Hugging Face tokenizer"
            )
        raw = read_file(path, option, LARGEST_TABLE)
        content = parse_object(raw, path, option)
        if found := _growing(content.get("normalizer")):
            raise UserError(
                f"{option}={folder}: {TOKENIZER} has a normalizer of type {found}, which can make a text endless: take Qwen's"
            )
        tokens = as_type(
            content.get("added_tokens") or [], list[dict[str, Any]], path, option, "added_tokens"
        )
        wanted = [{key: token.get(key) for key in ("content", "id")} for token in tokens]
        added = {
            token.content: token.id
            for token in as_type(wanted, list[_Added], path, option, "added_tokens")
        }
        model = as_type(content.get("model"), dict[str, Any], path, option, "model")
        form: Any = dict[str, Id] | list[tuple[str, float]]
        words = as_type(model.get("vocab"), form, path, option, "model.vocab")
        ids: dict[str, int] = (
            words
            if isinstance(words, dict)
            else {word[0]: index for index, word in enumerate(words)}
        )
        settings = read_json(folder / SETTINGS, option) if (folder / SETTINGS).exists() else {}
        return cls(
            folder,
            f"{option}={folder}",
            hashlib.sha256(raw).hexdigest(),
            ids | added,
            added,
            settings,
        )

    @property
    def last(self) -> tuple[str, int]:
        """The token with the highest id, and the id."""
        return max(self.ids.items(), key=lambda entry: entry[1], default=("none", -1))

    def differences(self, other: "TokenTable") -> Iterator[str]:
        """What two tokenizers do not agree in: ids of the same token, and how they cut the same text; a phrase each."""
        if self.hash == other.hash:
            return
        changed = {
            token: (number, other.ids[token])
            for token, number in self.ids.items()
            if other.ids.get(token, number) != number
        }
        if changed:
            token, (here, there) = min(changed.items(), key=lambda entry: entry[1])
            more = f", and {len(changed) - 1} more tokens differ" if len(changed) > 1 else ""
            yield f"{token} is {here} here and {there} there{more}"
            return
        rows = {number: token for token, number in other.ids.items()}
        renamed = sorted(
            (number, token)
            for token, number in self.ids.items()
            if token not in other.ids and number in rows
        )
        if renamed:  # a row that was trained as another token
            number, token = renamed[0]
            more = f", and {len(renamed) - 1} more ids differ" if len(renamed) > 1 else ""
            yield f"{number} is {token} here and {rows[number]} there{more}"
            return
        cuts = [one.cut(PROBE) for one in (self, other)]
        first = next((at for at, pair in enumerate(zip_longest(*cuts)) if pair[0] != pair[1]), None)
        if first is not None:
            mine, theirs = (cut[first : first + 3] for cut in cuts)
            yield f"the same text is cut as {mine} here and as {theirs} there"

    def cut(self, text: str) -> list[str]:
        """The tokens of a text; UserError if the file is no tokenizer."""
        content = read_file(self.folder / TOKENIZER, self.name.partition("=")[0], LARGEST_TABLE)
        try:
            tokens: list[str] = Backend.from_str(content.decode()).encode(text).tokens
        except (
            BaseException
        ) as error:  # the library raises bare Exception, and where it panics no Exception at all
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(
                f"{self.name}: {TOKENIZER} cannot be read: {one_line(str(error))[:LONGEST]}"
            ) from None
        return tokens
