"""Divide a pack over ranks: the tokens, visual tokens and pictures of one rank, and the ways of features between ranks.

Every rank works this out from the pack's text alone, so nothing but features and hidden states is ever sent.
Shapes: T tokens of a pack, t of them on this rank, M visual tokens, m of them on this rank, n pictures, E encoder ranks.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from numpy.typing import NDArray
from torch import Tensor

from visionloom.parallel.context import Split, TokenRows, split_pack
from visionloom.parallel.device import to_device
from visionloom.parallel.parts import VISION, in_part
from visionloom.parallel.topology import Topology


class PackTensors(Protocol):
    """The fields of a packed micro-batch that the model reads, on the host (see data/stream/batch.py PackedBatch)."""

    @property
    def input_ids(self) -> Tensor:
        """int64 [T]."""

    @property
    def labels(self) -> Tensor:
        """int64 [T]."""

    @property
    def loss_weights(self) -> Tensor:
        """fp32 [T]."""

    @property
    def position_ids(self) -> Tensor:
        """int32 [3, T]."""

    @property
    def padding_mask(self) -> Tensor:
        """Bool [T]."""

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [S + 1], from 0 to T."""

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest segment."""

    @property
    def patches(self) -> Tensor:
        """uint8 [N, 768 or 1536]: of the pictures that this encoder rank encodes, in order."""

    @property
    def grid_thw(self) -> Tensor:
        """int32 [n, 3]: of all pictures."""

    @property
    def encoder_ranks(self) -> Tensor:
        """int32 [n]: which encoder rank encodes each picture."""

    @property
    def visual_rows(self) -> Tensor:
        """int64 [M]."""


@dataclass(frozen=True)
class RankShare:
    """The rows of a pack that are this rank's, as indices on the host."""

    split: Split
    tokens: TokenRows
    """int64 [T / C]: rows of this context rank, in its order."""
    hidden: slice
    """Those of them with their hidden states on this rank (all, or its share under sequence parallelism)."""
    visual_rows: TokenRows
    """int64 [m]: rows among this rank's t hidden states that receive a feature."""
    visual_features: TokenRows
    """int64 [m]: the features among the M that they receive."""

    @classmethod
    def of(cls, pack: PackTensors, topology: Topology) -> "RankShare":
        """Return this rank's share of a pack."""
        split = split_pack(pack.cu_seqlens.numpy(), topology.context_size)
        shares = topology.config.tensor if topology.config.sequence_parallel else 1
        share = topology.tensor_rank if shares > 1 else 0
        return cls.at(pack.visual_rows.numpy(), split, topology.context_rank, share, shares)

    @classmethod
    def at(
        cls, visual: TokenRows, split: Split, context_rank: int, share: int, shares: int
    ) -> "RankShare":
        """Return the share of a context rank's tokens.

        Args:
            visual: the pack's visual rows, int64 [M], increasing.
            split: of the pack over the context ranks.
            context_rank: whose tokens.
            share: number of the share, below `shares`.
            shares: equal parts that the context rank's tokens are cut into.
        """
        tokens = split.ranks[context_rank]
        count = len(tokens) // shares
        hidden = slice(share * count, (share + 1) * count)

        own = tokens[hidden]
        places = np.searchsorted(visual, own)
        is_visual = np.zeros(count, bool)
        if len(visual):
            # A token after the last visual one has the place M, which is none.
            is_visual = visual[np.minimum(places, len(visual) - 1)] == own
        return cls(split, tokens, hidden, np.flatnonzero(is_visual), places[is_visual])


@dataclass(frozen=True)
class FeatureExchange:
    """Features from the ranks that encoded them to the ranks whose tokens they belong to, and their gradients back.

    Each rank encodes its own pictures only and sends every feature row once to each rank that needs it.
    """

    group: Any
    send: Tensor
    """int64: rows of this rank's features, those for the first rank first."""
    send_counts: list[int]
    receive_counts: list[int]
    order: Tensor
    """int64 [m]: the received row of each feature of this rank's visual tokens."""

    @classmethod
    def build(
        cls, pack: PackTensors, own: RankShare, topology: Topology, merge: int
    ) -> "FeatureExchange":
        """Compute the rows that each rank sends to each other; `merge` x `merge` patches make one feature."""
        visual, ranks = pack.visual_rows.numpy(), topology.config.encoder_ranks
        owner, place = owners(pack.grid_thw.numpy(), pack.encoder_ranks.numpy(), merge)
        shares = ranks // topology.config.context
        send = []
        for rank in range(ranks):
            context_rank, share = divmod(rank, shares)
            other = RankShare.at(visual, own.split, context_rank, share, shares)
            needed = other.visual_features
            send.append(place[needed[owner[needed] == topology.encoder_rank]])

        mine = owner[own.visual_features]
        # Rows arrive by sender, and from each in order of the tokens: the rank of each in a stable sort.
        order = np.argsort(np.argsort(mine, kind="stable"), kind="stable")
        device = topology.device
        return cls(
            topology.encoder_group,
            send=to_device(torch.from_numpy(np.concatenate(send)), device),
            send_counts=[len(rows) for rows in send],
            receive_counts=np.bincount(mine, minlength=ranks).tolist(),
            order=to_device(torch.from_numpy(order), device),
        )

    @in_part(VISION)
    def __call__(self, features: Tensor) -> Tensor:
        """Exchange this rank's encoded features [own, W] for those of its visual tokens [m, W]."""
        # One rank has all of them, in the order of its tokens.
        if len(self.send_counts) == 1:
            return features
        received: Tensor = all_to_all(
            self.group, features[self.send], self.receive_counts, self.send_counts
        )
        return received[self.order]


def owners(
    grids: NDArray[np.int32], ranks: NDArray[np.int32], merge: int
) -> tuple[TokenRows, TokenRows]:
    """Return the encoder rank of each of the M features, and its row among that rank's features; int64 [M] each."""
    counts = grids.astype(np.int64).prod(1) // merge**2
    owner = np.repeat(ranks.astype(np.int64), counts)
    # A rank's features are in the order of its pictures in the pack.
    place = np.empty(len(owner), np.int64)
    for rank in np.unique(owner):
        mine = owner == rank
        place[mine] = np.arange(int(mine.sum()))
    return owner, place
