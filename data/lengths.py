"""Tokens and patches of every sample, counted without decoding a picture and kept beside the dataset.

Plans are made from these tables alone. A table is named by a hash of everything it depends on: the dataset's content, the
tokenizer, the template and the pixel and frame limits.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from visionloom.data import chat, geometry
from visionloom.data.config import MediaConfig
from visionloom.data.encode import EncodedSample, encode_all
from visionloom.data.shards import Dataset
from visionloom.data.tokenizer import Tokenizer
from visionloom.parallel.errors import UserError

TABLE_VERSION: Final = 1
LENGTHS: Final = np.dtype(
    [("tokens", "<i4"), ("patches", "<i4"), ("supervised", "<i4"), ("patch_squares", "<i8")],
)
"""One row a sample; `patch_squares` is the sum over frames of (patches of the frame) squared, the cost of vision attention."""
OVER_LENGTH: Final = ("error", "drop")
_BATCH: Final = 512

Lengths = NDArray[Any]


def lengths_hash(fingerprint: str, tokenizer: Tokenizer, rules: MediaConfig) -> str:
    """Name of the table of a dataset under these rules: 32 hexadecimal digits."""
    facts = [
        TABLE_VERSION,
        chat.TEMPLATE_VERSION,
        geometry.RULE,
        fingerprint,
        tokenizer.fingerprint,
        sorted(dataclasses.asdict(rules).items()),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def load_lengths(dataset: Dataset, tokenizer: Tokenizer, rules: MediaConfig, cache: Path) -> Lengths:
    """The table of a dataset (dtype LENGTHS, a row a sample), from `cache` or counted now and put there.

    Written under another name and renamed, so that several ranks may do it at once; a folder that cannot be written is
    no fault. Raises SampleError for a sample that cannot be rendered.
    """
    path = cache / f"lengths-{lengths_hash(dataset.fingerprint, tokenizer, rules)}.npy"
    with suppress(OSError, ValueError, EOFError):  # not there, or cut short by a crash: counted again
        table: Lengths = np.load(path)
        if table.dtype == LENGTHS and len(table) == len(dataset):
            return table
    table = count_lengths(dataset, tokenizer, rules)
    _write(path, table)
    return table


def count_lengths(dataset: Dataset, tokenizer: Tokenizer, rules: MediaConfig) -> Lengths:
    """Count tokens and patches of all samples by encoding them, so that no length can differ from the encoded one."""
    rows: list[tuple[int, int, int, int]] = []
    for start in range(0, len(dataset), _BATCH):
        samples = [dataset.sample(index) for index in range(start, min(start + _BATCH, len(dataset)))]
        rows += [_row(encoded) for encoded in encode_all(samples, tokenizer, rules, [dataset.name] * len(samples))]
    return np.array(rows, LENGTHS)


def _row(sample: EncodedSample) -> tuple[int, int, int, int]:
    grids = sample.grids.astype(np.int64)
    squares = int((grids[:, 0] * (grids[:, 1] * grids[:, 2]) ** 2).sum())
    return len(sample.input_ids), sample.patch_count, sample.supervised_tokens, squares


def _write(path: Path, table: Lengths) -> None:
    unfinished = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    with suppress(OSError):  # a table that cannot be kept is counted again
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("wb") as file:
                np.save(file, table)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a pack can hold, and the options that say so in an error."""

    tokens: int
    patches: int
    tokens_option: str
    policy: str
    policy_option: str


def fitting(table: Lengths, limits: Limits, name: str, sample_id: Callable[[int], str]) -> NDArray[np.int64]:
    """Indices of the samples that fit a pack; the others are dropped, or refused under the policy `error`.

    Raises UserError naming the dataset, the longest sample, its size, the limit and the options; and if none fits.
    """
    if limits.policy not in OVER_LENGTH:
        raise UserError(f"{limits.policy_option}={limits.policy} is unknown: use one of {', '.join(OVER_LENGTH)}")
    over_tokens, over_patches = table["tokens"] > limits.tokens, table["patches"] > limits.patches
    over = over_tokens | over_patches
    if limits.policy == "error" and over.any():
        kind, mask, most = (
            ("tokens", over_tokens, limits.tokens) if over_tokens.any() else ("patches", over_patches, limits.patches)
        )
        worst = int(np.argmax(np.where(mask, table[kind], 0)))
        fix = (
            f"raise {limits.tokens_option}"
            if kind == "tokens"
            else "raise data.patch_budget (patches per token of the sequence)"
        )
        raise UserError(
            f"dataset {name}: sample {sample_id(worst)} has {table[kind][worst]} {kind}, a pack holds {most}"
            f" ({int(mask.sum())} such samples): {fix}, or set {limits.policy_option}=drop"
        )
    kept = np.flatnonzero(~over)
    if not len(kept):
        raise UserError(f"dataset {name}: none of its {len(table)} samples fits a pack: raise {limits.tokens_option}")
    return kept
