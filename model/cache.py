"""Keep keys and values of sequences that are being generated, and attend to them.

A pass attends once in each decoder layer, in order, so that a context takes the caches of the layers one after the other.
Shapes: S sequences, each at a place of its own; N places, c tokens that each has room for, R rows of a pack, H query heads, G
key/value heads (of this tensor rank), D head dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from visionloom.model.attention import Context
from visionloom.parallel.device import to_device

BLOCK = 64
"""Tokens by which the room of the sequences grows."""


@dataclass
class LayerCache:
    """Keys and values of one layer."""

    keys: Tensor
    """[N, G, c, D]."""
    values: Tensor
    """[N, G, c, D]."""

    def write(self, places: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Write rows [R, G, D] at places and positions, int64 [R] each."""
        self.keys[places, :, positions] = key
        self.values[places, :, positions] = value

    def first(self, places: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first tokens of the first places, [places, G, tokens, D] each."""
        return self.keys[:places, :, :tokens], self.values[:places, :, :tokens]

    def resize(self, places: int, room: int) -> None:
        """Make room for as many sequences of as many tokens; what fits of those that are there stays."""
        self.keys = _resized(self.keys, places, room)
        self.values = _resized(self.values, places, room)

    def move(self, source: int, target: int) -> None:
        """Give a sequence another place."""
        for cached in (self.keys, self.values):
            cached[target] = cached[source]


def _resized(cached: Tensor, places: int, room: int) -> Tensor:
    # Zeros: attention multiplies what it does not see by 0, which leaves a number that is none.
    resized = cached.new_zeros(places, cached.shape[1], room, cached.shape[3])
    kept = cached[:places, :, :room]
    resized[: kept.shape[0], :, : kept.shape[2]] = kept
    return resized


class KeyValueCache:
    """Keys and values of all layers of a chunk of the model."""

    def __init__(self, layers: int, heads: int, head_dim: int, like: Tensor) -> None:
        """Open a cache without room.

        Args:
            layers: of the chunk.
            heads: key/value heads G.
            head_dim: D.
            like: a tensor of the cache's dtype, on its device.
        """
        self.sequences = self.tokens = 0
        self.layers = []
        for _ in range(layers):
            keys = like.new_zeros(0, heads, 0, head_dim)
            self.layers.append(LayerCache(keys, keys.clone()))

    def reserve(self, sequences: int, tokens: int) -> None:
        """Make room for all `sequences` that there are, of at most `tokens` each."""
        if sequences <= self.sequences and tokens <= self.tokens:
            return
        # In blocks, or each new token would copy all that there is. Not more sequences than there are, which
        # were many when they were short.
        self.sequences, self.tokens = sequences, tokens + -tokens % BLOCK
        for layer in self.layers:
            layer.resize(self.sequences, self.tokens)

    def move(self, source: int, target: int) -> None:
        """Give a sequence another place."""
        for layer in self.layers:
            layer.move(source, target)


@dataclass(frozen=True)
class KeptRows:
    """Rows of a pack whose keys and values are kept, on the device."""

    rows: Tensor
    """int64 [R]: one that several sequences begin with is kept for each."""
    places: Tensor
    """int64 [R]: of their sequences."""
    positions: Tensor
    """int64 [R]: in their sequences."""

    @classmethod
    def build(
        cls,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        first: int,
        device: torch.device,
    ) -> "KeptRows":
        """Keep what each of several sequences begins with, int64 [sequences]; the first has place `first`."""
        positions = np.concatenate([np.arange(length) for length in lengths])
        rows = np.repeat(starts, lengths) + positions
        places = np.repeat(first + np.arange(len(lengths)), lengths)
        there = [to_device(torch.from_numpy(x), device) for x in (rows, places, positions)]
        return cls(*there)


@dataclass(frozen=True)
class PromptContext:
    """Attention inside of the prompts of a pack, whose keys and values are kept."""

    packed: Context
    """Attention of the pack."""
    layers: Iterator[LayerCache]
    kept: KeptRows

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attend from [T, H, D] and twice [T, G, D] to [T, H, D]."""
        kept = self.kept
        layer = next(self.layers)
        layer.write(kept.places, kept.positions, key[kept.rows], value[kept.rows])
        return self.packed.attend(query, key, value, scale)


@dataclass(frozen=True)
class DecodingContext:
    """Attention of one new token of each sequence to all that its sequence has; rows after these are padding."""

    layers: Iterator[LayerCache]
    places: Tensor
    """int64 [S]: the n-th sequence has place n."""
    positions: Tensor
    """int64 [S]: of the new tokens."""
    seen: Tensor
    """bool [S, 1, 1, longest]: which tokens of its place each sequence has, the new one included."""

    @classmethod
    def build(
        cls, layers: Iterator[LayerCache], positions: NDArray[np.int64], device: torch.device
    ) -> "DecodingContext":
        """Attend from new tokens at these positions, int64 [S]."""
        # From the host's numbers: the device is not waited for.
        longest = int(positions.max(initial=-1)) + 1
        numbers = torch.arange(longest, device=device)
        there = to_device(torch.from_numpy(positions), device)
        seen = numbers <= there[:, None]
        places = torch.arange(len(positions), device=device)
        return cls(layers, places, there, seen[:, None, None])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attend from [t, H, D] and twice [t, G, D] to [t, H, D]."""
        layer = next(self.layers)
        count = len(self.seen)
        # A rank without sequences takes part for the sake of others.
        if not count:
            return query.new_zeros(query.shape)

        layer.write(self.places, self.positions, key[:count], value[:count])
        # The query heads that share keys are as rows of one: no key is repeated.
        grouped = query[:count].unflatten(1, (key.shape[1], -1))
        cached = layer.first(count, self.seen.shape[-1])
        result = F.scaled_dot_product_attention(grouped, *cached, attn_mask=self.seen, scale=scale)
        # Nobody reads the rows of padding, but they are normalised: zeros stay numbers.
        padding = len(query) - count
        return F.pad(result.flatten(1, 2), (0, 0, 0, 0, 0, padding))
