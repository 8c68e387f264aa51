"""A small byte-level BPE tokenizer with Qwen3-VL's special tokens, trained on the texts of the demo."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Final

from visionloom.data.config import MediaConfig
from visionloom.data.encode.chat import render
from visionloom.data.shards.sample import Sample

VOCABULARY: Final = 512
"""256 bytes, 230 merges, 26 special tokens."""
QWEN_PATTERN: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen2's pre-tokenizer: digits stand alone, a word takes the space before it."""
SPECIAL_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_TOKENS: Final = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Added tokens that decoding keeps when special tokens are skipped, as Qwen3 flags them."""
_FILLER: Final = (
    "a picture of the number and its place in this short answer to every question about what can be read here; "
    "system tool describe video frame second minute point label image caption table chart title paragraph section "
    "before after between above below first second third last next previous same different larger smaller "
    "because therefore since while until where when which whose there their would could should"
)
"""Words that fill the vocabulary up, since the demo's own texts do not need all 230 merges."""


def train_tokenizer(folder: Path, samples: Iterable[Sample]) -> None:
    """Train on the samples' texts and save a Hugging Face tokenizer folder; the bytes depend on the samples only."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # as Qwen3-VL's own tokenizer splits
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    added += [AddedToken(token, normalized=False, special=False) for token in PLAIN_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        # the texts are few, and each pair may come once
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_texts(samples), trainer)
    tokenizer.add_tokens(added)
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(_config(), indent=1) + "\n")


def _config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 262144,
    }


def _texts(samples: Iterable[Sample]) -> Iterator[str]:
    """Yield what the model will read of the samples, without the special tokens in between."""
    yield _FILLER
    rules = MediaConfig(image_min_pixels=1)
    for sample in samples:
        pieces_of_sample = render(sample, rules).pieces
        # a piece with a count is a special token
        for is_text, pieces in groupby(pieces_of_sample, key=lambda piece: piece.count == 0):
            if is_text:
                yield "".join(piece.text for piece in pieces)
