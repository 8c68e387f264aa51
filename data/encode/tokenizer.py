"""The tokenizer of a run: Qwen's byte-level BPE, in which special tokens come from structure and never from text."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from visionloom.common.errors import UserError
from visionloom.common.jsonfile import load_json
from visionloom.common.places import PlaceError, read_located
from visionloom.data.config import INSTRUCT, THINKING, DataConfig

FILE: Final = "tokenizer.json"
LARGEST: Final = 256 << 20
"""Bytes of tokenizer.json; that of Qwen3-VL has 11 million."""
END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
VISION_START: Final = "<|vision_start|>"
VISION_END: Final = "<|vision_end|>"
IMAGE: Final = "<|image_pad|>"
VIDEO: Final = "<|video_pad|>"
THINK_START: Final = "<think>"
THINK_END: Final = "</think>"
CALL_START: Final = "<tool_call>"
CALL_END: Final = "</tool_call>"
RESPONSE_START: Final = "<tool_response>"
RESPONSE_END: Final = "</tool_response>"
REQUIRED: Final = (
    END_OF_TEXT,
    TURN_START,
    TURN_END,
    VISION_START,
    VISION_END,
    IMAGE,
    VIDEO,
    THINK_START,
    THINK_END,
)
FOR_TOOLS: Final = (CALL_START, CALL_END, RESPONSE_START, RESPONSE_END)
"""Needed only by samples with tools."""


class Tokenizer:
    """Reads `tokenizer.json` of a Hugging Face tokenizer folder.

    Text is encoded by a copy without the tokens that structure is written with, so that `<|im_end|>` inside a user's message
    is spelled out in ordinary tokens and can neither end a turn nor stand for an image. Added tokens that are not special, such as
    words that a user added for a task, match in text as in every server. `chat_format` goes along, as templates of chats do with
    tokenizers: samples are rendered by it. Raises UserError if the file or one of Qwen3-VL's special
    tokens is missing.
    """

    def __init__(self, folder: str, chat_format: str = INSTRUCT) -> None:
        self.folder, self.chat_format = folder, chat_format
        raw = _read(folder)
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        words = self._load(raw)
        self._ids = self._ids_of_words(words)
        self._special = self._special_ids()

    def _load(self, raw: bytes) -> list[str]:
        """Make the two tokenizers of the file, and return the added tokens that are plain words."""
        try:
            self._whole = Backend.from_str(raw.decode())
            document = load_json(raw, FILE)
            # without them <|im_end|> in a text is spelled out in ordinary tokens
            words = [token for token in document.get("added_tokens", []) if _is_word(token)]
            plain = {**document, "added_tokens": words, "post_processor": None}
            self._plain = Backend.from_str(json.dumps(plain))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"data.tokenizer={self.folder}: tokenizer.json cannot be read: {error}"
            ) from None
        # a file may ask for padding and truncation, which plans know nothing of
        for backend in (self._whole, self._plain):
            backend.no_padding()
            backend.no_truncation()
        return [token["content"] for token in words]

    def _special_ids(self) -> dict[str, int]:
        """Return the ids of the special tokens of the file; raises UserError if it lacks one."""
        ids: dict[str, int] = {}
        for token in (*REQUIRED, *FOR_TOOLS):
            number = self._whole.token_to_id(token)
            if number is not None:
                ids[token] = number
        if missing := [token for token in REQUIRED if token not in ids]:
            raise UserError(
                f"data.tokenizer={self.folder} lacks special tokens of Qwen3-VL: {' '.join(missing)}"
            )
        return ids

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, str]]:
        return Tokenizer, (self.folder, self.chat_format)

    @classmethod
    def of(cls, data: DataConfig) -> "Tokenizer":
        """Read the tokenizer of a run."""
        return cls(data.tokenizer, data.chat_format)

    @property
    def pad_id(self) -> int:
        """Return the id of `<|endoftext|>`, which fills what is left of a pack."""
        return self._special[END_OF_TEXT]

    @property
    def stop_ids(self) -> tuple[int, int]:
        """Return the ids that end a generated answer: `<|im_end|>` and `<|endoftext|>`."""
        return self._special[TURN_END], self._special[END_OF_TEXT]

    @property
    def answer_start(self) -> str:
        """Return what a prompt already has of the answer that it waits for."""
        return f"{THINK_START}\n" if self.chat_format == THINKING else ""

    @cached_property
    def size(self) -> int:
        """Count the ids, special tokens included."""
        return int(self._whole.get_vocab_size(with_added_tokens=True))

    def special(self, token: str) -> int:
        """Return the id of one of the REQUIRED tokens, or of those FOR_TOOLS; raises UserError if the tokenizer lacks it."""
        if token not in self._special:
            raise UserError(
                f"data.tokenizer={self.folder} lacks {token}, which samples with tools need"
            )
        return self._special[token]

    def id_of(self, token: str) -> int | None:
        """Return the id of any token; None if there is none."""
        number: int | None = self._whole.token_to_id(token)
        return number

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Return the token ids of plain texts, int32 [n] each; special tokens spelled inside them stay text."""
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._numbered(encoding) for encoding in encodings]

    def encode_with_ends(
        self, texts: Sequence[str]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Encode like `encode`, and return the last character that each token covers, int64 [n]."""
        encodings = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [(self._numbered(encoding), _ends(encoding)) for encoding in encodings]

    def _ids_of_words(self, words: list[str]) -> NDArray[np.int32] | None:
        """Return the true id of each id of the copy for text, int32 [ids]; None if all are equal.

        The copy counts its added tokens without gaps.
        """
        own: dict[int, int] = {}
        for word in words:
            own[int(self._plain.token_to_id(word) or 0)] = int(self._whole.token_to_id(word) or 0)
        if all(one == other for one, other in own.items()):
            return None
        ids = np.arange(max(own) + 1, dtype=np.int32)
        ids[list(own)] = list(own.values())
        return ids

    def _numbered(self, encoding: Encoding) -> NDArray[np.int32]:
        ids = np.array(encoding.ids, np.int32)
        return ids if self._ids is None else self._ids[ids]

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        """Return the text of token ids; special tokens are left out unless kept."""
        return str(self._whole.decode(list(ids), skip_special_tokens=not keep_special))


def _read(folder: str) -> bytes:
    """Read tokenizer.json of a folder; raises UserError."""
    try:
        if folder:
            return read_located(Path(folder), FILE, LARGEST)
    except PlaceError as error:
        raise UserError(
            f"data.tokenizer={folder}: {FILE} {error}: put the file itself there"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        pass
    raise UserError(
        f"data.tokenizer={folder}: no {FILE} there: give the folder of a fast Hugging Face tokenizer"
    )


def _is_word(token: Mapping[str, Any]) -> bool:
    """Whether an added token matches in text: it is not special, and none that structure is written with."""
    return not token.get("special") and token.get("content") not in (*REQUIRED, *FOR_TOOLS)


def _ends(encoding: Encoding) -> NDArray[np.int64]:
    """Return the last character that each token covers, int64 [n]."""
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    # a token of no characters, as of a dummy prefix, has its end at 0
    return np.maximum(offsets[:, 1] - 1, 0)
