"""Plans from lengths alone: fill, time, balance, resume and state, each beside the peers' way, measured in this run.

    python benchmarks/data/plan.py [--samples 20000]

Peers' ideas are written anew here: next-fit; first-fit decreasing over a buffer of 16 or 1,000 samples; packs dealt to ranks
in order. Times are those of one core.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2] / ".link")

import numpy as np

from visionloom.benchmarks.data.mixtures import MIXTURES, LengthMixture
from visionloom.data.balance import CostModel, Pack, deal
from visionloom.data.packing import pack_samples
from visionloom.data.plan import Plan, Settings, Source
from visionloom.data.views import VIEW, Views

WINDOW = 1024
PATCHES_PER_TOKEN = 3.2
LAYOUTS = {"8k": 64, "32k": 64, "256k": 16}
"""Data-parallel ranks of each mixture; each has PACKS_PER_RANK packs a step."""
PACKS_PER_RANK = 4
QWEN3VL_8B = CostModel(1.0, 2.123e-5, 0.06513, 8.956e-6)
"""Operations of forward and backward in units of a token's: `cost_model` of train/cost.py for model=qwen3vl_8b."""
GOALS = {
    "8k": {"fill": 0.997, "useful": 0.99},
    "32k": {"fill": 0.998, "useful": 0.96},
    "256k": {"fill": 0.999, "useful": 0.97},
}


def plan_of(mixture: LengthMixture, samples: int, global_batch: int, seed: int = 0, cache: Path | None = None) -> Plan:
    """A plan of one dataset with the lengths of a mixture; what is longer than a pack is dropped."""
    table = mixture.table(samples, seed)
    budget = int(PATCHES_PER_TOKEN * mixture.tokens)
    over = np.flatnonzero((table["tokens"] > mixture.tokens) | (table["patches"] > budget))
    source = Source("mixture", 1.0, Views(table, over, np.empty(0, VIEW)), "mixture", "drop")
    settings = Settings(seed, "bench", mixture.tokens, global_batch, budget, WINDOW, block=64)
    return Plan([source], settings, QWEN3VL_8B, cache=cache)


def rank_costs(dealt: list[list[list[Pack]]]) -> list[float]:
    """Work of each rank."""
    return [sum(pack.cost for micro in rank for pack in micro) for rank in dealt]
