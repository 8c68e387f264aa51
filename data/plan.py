"""The plan of a phase: which samples share a pack, which packs make a step, which rank and micro-batch gets which pack.

A pure function of settings and length tables, in numpy. The stream of draws is cut into segments that are packed on their
own, so any step can be planned from the number of packs before its segment. Data parallelism only deals the packs of a
step out; it never changes them.
"""

import dataclasses
import hashlib
import json
import threading
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visionloom.data.lengths import Lengths
from visionloom.data.mixture import PERIOD, Mixture, key_of, mix
from visionloom.data.packing import pack_samples
from visionloom.parallel.errors import UserError

PLAN_VERSION: Final = 1
_PACKS_PER_SEGMENT: Final = 512
"""Packs aimed at in a segment: its last, partly filled pack then costs 0.1 % of fill, and planning takes about 30 ms."""
_SMALLEST_SEGMENT: Final = 256
_SMALLEST_WINDOW: Final = 64
_KEPT_SEGMENTS: Final = 4


@dataclass(frozen=True, slots=True)
class Source:
    """A dataset as the plan sees it."""

    name: str
    weight: float
    kept: NDArray[np.int64]
    """Samples that fit a pack; only these are drawn."""
    lengths: Lengths
    """Table over all samples."""
    identity: str
    """Hash of what the table depends on: content, tokenizer, template, pixel and frame limits."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What decides the content of packs and steps, apart from the sources."""

    seed: int
    phase: str
    sequence_length: int
    global_batch: int
    patch_budget: int
    """Patches of one pack."""
    window: int


@dataclass(frozen=True, slots=True)
class CostModel:
    """Time of a pack, in units of one text token's linear layers; it balances ranks and never changes a step's content.

    The squares are attention's: 2lh FLOPs against 24h^2 in a causal layer (h = 2048), 4ph against 24h^2 in a vision
    layer (h = 1152).
    """

    patch: float = 0.1

    def of(self, rows: Lengths) -> NDArray[np.float64]:
        """Cost of each sample of a table."""
        tokens = rows["tokens"].astype(np.float64)
        language = tokens + tokens**2 / (12 * 2048)
        vision: NDArray[np.float64] = rows["patches"] + rows["patch_squares"] / (6 * 1152)
        return language + self.patch * vision


@dataclass(frozen=True, slots=True)
class Pack:
    """Samples that share a pack: dataset numbers and sample indices, and the pack's cost."""

    sources: tuple[int, ...]
    samples: tuple[int, ...]
    cost: float

    @property
    def places(self) -> list[tuple[int, int]]:
        """(dataset number, sample index) of each sample."""
        return list(zip(self.sources, self.samples, strict=True))


@dataclass(frozen=True, slots=True)
class Segment:
    """The packs of one segment in stream order, and the dataset of each of their samples."""

    first_pack: int
    packs: list[Pack]


class Plan:
    """Plans steps on demand. Safe in threads; a few segments are kept."""

    def __init__(self, sources: list[Source], settings: Settings, cost: CostModel | None = None) -> None:
        self.sources, self.settings, self.cost = sources, settings, cost or CostModel()
        self.draws_per_segment = _draws_per_segment(sources, settings)
        # of a small dataset no more than a quarter of an epoch waits, or epochs would run into each other
        self.window = min(settings.window, max(_SMALLEST_WINDOW, sum(len(source.kept) for source in sources) // 4))
        self._seed = int(key_of(settings.seed, f"phase {settings.phase}"))
        names, sizes = [source.name for source in sources], [len(source.kept) for source in sources]
        self.mixture = Mixture(names, sizes, [source.weight for source in sources], self._seed)
        self._first_packs = {0: 0}
        self._segments: dict[int, Segment] = {}
        self._lock = threading.Lock()

    @property
    def facts(self) -> dict[str, Any]:
        """Everything the plan depends on, by the name of its option."""
        settings = dataclasses.asdict(self.settings)
        datasets = {
            source.name: {"weight": source.weight, "content": source.identity, "samples": len(source.kept)}
            for source in self.sources
        }
        return {"version": PLAN_VERSION, **settings, "draws_per_segment": self.draws_per_segment, "datasets": datasets}

    @property
    def hash(self) -> str:
        """32 hexadecimal digits over everything that decides what a step contains."""
        return hashlib.sha256(json.dumps(self.facts).encode()).hexdigest()[:32]

    def step(self, step: int) -> list[Pack]:
        """The packs of an optimizer step, counted from 0 in the phase: `global_batch` of them."""
        first = step * self.settings.global_batch
        packs: list[Pack] = []
        with self._lock:
            number = self._segment_of(first)
            while len(packs) < self.settings.global_batch:
                segment = self._segment(number)
                start = first + len(packs) - segment.first_pack
                packs += segment.packs[start : start + self.settings.global_batch - len(packs)]
                number += 1
        return packs

    def cursor(self, step: int) -> dict[str, int]:
        """Segment in which a step begins, and the number of packs before that segment."""
        with self._lock:
            number = self._segment_of(step * self.settings.global_batch)
            return {"segment": number, "first_pack": self._first_packs[number]}

    def jump(self, segment: int, first_pack: int) -> None:
        """Take from a checkpoint how many packs lie before a segment, so that those before it need not be planned."""
        with self._lock:
            self._first_packs[segment] = first_pack

    def draws_before(self, step: int) -> dict[str, int]:
        """Samples of each dataset in the steps before this one."""
        cursor = self.cursor(step)
        counts = self.mixture.counts(cursor["segment"] * self.draws_per_segment)
        consumed = step * self.settings.global_batch - cursor["first_pack"]
        with self._lock:
            packs = self._segment(cursor["segment"]).packs[:consumed]
        for pack in packs:
            counts += np.bincount(pack.sources, minlength=len(self.sources))
        return {source.name: int(count) for source, count in zip(self.sources, counts, strict=True)}

    @property
    def known_starts(self) -> dict[int, int]:
        """Number of packs before each segment that was met so far."""
        with self._lock:
            return dict(self._first_packs)

    def _segment_of(self, pack: int) -> int:
        known = sorted(self._first_packs.items())
        number = known[bisect_right([first for _, first in known], pack) - 1][0]
        while (segment := self._segment(number)).first_pack + len(segment.packs) <= pack:
            number += 1
        return number

    def _segment(self, number: int) -> Segment:
        """A segment whose number of packs before it is known."""
        if number not in self._segments:
            segment = self._segments[number] = Segment(self._first_packs[number], self._make_packs(number))
            self._first_packs[number + 1] = segment.first_pack + len(segment.packs)
            for oldest in list(self._segments)[:-_KEPT_SEGMENTS]:
                del self._segments[oldest]
        return self._segments[number]

    def _make_packs(self, number: int) -> list[Pack]:
        draws = self.mixture.draws(number * self.draws_per_segment, self.draws_per_segment)
        rows, samples = self._rows(draws.datasets, draws.samples)
        settings = self.settings
        packed = pack_samples(
            rows["tokens"].tolist(), rows["patches"].tolist(), settings.sequence_length, settings.patch_budget, self.window
        )
        order = self._order(number, len(packed))
        costs = self.cost.of(rows)
        return [
            Pack(tuple(draws.datasets[p].tolist()), tuple(samples[p].tolist()), float(costs[p].sum()))
            for p in (packed[place] for place in order)
        ]

    def _order(self, number: int, packs: int) -> NDArray[np.intp]:
        """A seeded order of a segment's packs, or of each epoch in it: the largest samples would come first otherwise."""
        epoch = sum(len(source.kept) for source in self.sources)
        stretch = max(2, max(2 * self.window, epoch) * packs // self.draws_per_segment)
        shuffled = mix(np.arange(packs, dtype=np.uint64), key_of(self._seed, f"order {number}"))
        return np.lexsort((shuffled, np.arange(packs) // stretch))

    def _rows(self, datasets: NDArray[np.int32], ordinals: NDArray[np.int64]) -> tuple[Lengths, NDArray[np.int64]]:
        rows = np.empty(len(datasets), self.sources[0].lengths.dtype)
        samples = np.empty(len(datasets), np.int64)
        for index, source in enumerate(self.sources):
            mine = datasets == index
            samples[mine] = source.kept[ordinals[mine]]
            rows[mine] = source.lengths[samples[mine]]
        return rows, samples


def _draws_per_segment(sources: list[Source], settings: Settings) -> int:
    """A power of two up to the mixture's period that makes about _PACKS_PER_SEGMENT packs."""
    weights = np.array([source.weight for source in sources])
    means = [[source.lengths[name][source.kept].mean() for source in sources] for name in ("tokens", "patches")]
    tokens, patches = (float(np.dot(weights, mean) / weights.sum()) for mean in means)
    packs_per_draw = max(tokens / settings.sequence_length, patches / settings.patch_budget)
    draws = int(_PACKS_PER_SEGMENT / packs_per_draw)
    return min(PERIOD, max(_SMALLEST_SEGMENT, 1 << (draws - 1).bit_length()))


def deal(packs: list[Pack], dp_size: int, micro_batch: int) -> list[list[list[Pack]]]:
    """Deal the packs of a step to data-parallel ranks and micro-batches, balanced by cost: [rank][micro-batch][pack].

    Costliest first to the lightest rank that has room (longest processing time first), then the same inside each rank;
    micro-batches come costliest first, so that the k-th ones of all ranks are alike. Raises UserError if the packs
    cannot be dealt evenly.
    """
    if len(packs) % (dp_size * micro_batch):
        raise UserError(
            f"global_batch={len(packs)} packs cannot be dealt to {dp_size} data-parallel ranks x micro_batch {micro_batch}:"
            f" make it a multiple of {dp_size * micro_batch}"
        )
    ranks = _balance(packs, dp_size)
    return [_balance(mine, len(mine) // micro_batch) for mine in ranks]


def _balance(packs: list[Pack], groups: int) -> list[list[Pack]]:
    """Groups of equal size, costliest group first."""
    room = len(packs) // groups
    dealt: list[list[Pack]] = [[] for _ in range(groups)]
    loads = [0.0] * groups
    for pack in sorted(packs, key=lambda pack: -pack.cost):
        lightest = min((g for g in range(groups) if len(dealt[g]) < room), key=lambda g: loads[g])
        dealt[lightest].append(pack)
        loads[lightest] += pack.cost
    return [dealt[g] for g in sorted(range(groups), key=lambda g: -loads[g])]
