"""Plans from lengths alone: fill, time, balance, resume, state and the counting before, each beside the peers' way, measured in this run.

    python benchmarks/data/plan.py [--samples 40000]

Peers' ideas are written anew here: next-fit; first-fit decreasing over a buffer of 16 or of 1,000 samples, each emptied before
the next; their packs dealt to ranks in order; resuming by going through the stream again. Times are of one core.
"""

import argparse
import hashlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2] / ".link")

import numpy as np

from visionloom.benchmarks.data import synthetic
from visionloom.benchmarks.data.mixtures import MIXTURES, fitting
from visionloom.benchmarks.data.table import Row, show
from visionloom.data.config import DataConfig, DatasetConfig, MediaConfig
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.cursor import Origin
from visionloom.data.plan.deal import CostModel, PlannedPack, deal
from visionloom.data.plan.lengths import Counting
from visionloom.data.plan.open import StreamOptions
from visionloom.data.plan.parts import PART, Parts
from visionloom.data.plan.plan import MixtureEntry, Plan, Settings
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.index import index_shard
from visionloom.data.shards.write import write_shards
from visionloom.data.stream.train_stream import PackStream
from visionloom.forecast.mixture import LengthMixture
from visionloom.parallel.share import Share

WINDOW = 1024
PATCHES_PER_TOKEN = 3.2
LAYOUTS = {"8k": 64, "32k": 64, "256k": 16}
"""Data-parallel ranks of each mixture."""
PACKS_PER_RANK = 4
QWEN3VL_8B = CostModel(1.0, 2.123e-5, 0.06513, 8.956e-6)
"""Operations of forward and backward in units of a token's: `cost_model` of train/cost.py for model=qwen3vl_8b."""
FILL = {"8k": 0.999, "32k": 0.999, "256k": 0.999}
USEFUL = {"8k": 0.99, "32k": 0.96, "256k": 0.97}
WORST = 1.03
"""Work of the rank with the most, of the mean, in every step."""
MICROSECONDS_PER_SAMPLE, RESUME_SECONDS, STATE_BYTES, MINUTES_PER_MILLION = 10.0, 0.5, 4096, 10.0

Packing = Callable[[list[int], list[int], int, int], list[list[int]]]


def plan_of(
    mixture: LengthMixture,
    samples: int,
    global_batch: int,
    seed: int = 0,
    patches_per_token: float = 3.2,
) -> Plan:
    """A plan of one dataset with the lengths of a mixture; what is longer than a pack is dropped."""
    table = mixture.draw(samples, seed).lengths
    budget = int(patches_per_token * mixture.sequence_length)
    over = np.flatnonzero((table["tokens"] > mixture.sequence_length) | (table["patches"] > budget))
    source = MixtureEntry("mixture", 1.0, Parts(table, over, np.empty(0, PART)), "mixture", "drop")
    settings = Settings(
        seed,
        "bench",
        mixture.sequence_length,
        global_batch,
        budget,
        WINDOW,
        shuffle_block_samples=64,
    )
    return Plan([source], settings, QWEN3VL_8B)


def rank_costs(dealt: list[list[list[PlannedPack]]]) -> list[float]:
    """Work of each rank."""
    return [sum(pack.cost for micro in rank for pack in micro) for rank in dealt]


# ---- the peers' ideas


def next_fit(
    tokens: list[int], _: list[int], token_budget: int, patch_budget: int
) -> list[list[int]]:
    """Fill a pack until the next sample does not fit."""
    packs, room = list[list[int]](), 0
    for number, size in enumerate(tokens):
        if size > room or not packs:
            packs.append([])
            room = token_budget
        packs[-1].append(number)
        room -= size
    return packs


def first_fit_decreasing(buffer: int) -> Packing:
    """First-fit of the largest first over a buffer of samples, which is emptied before the next one."""

    def packing(
        tokens: list[int], _: list[int], token_budget: int, patch_budget: int
    ) -> list[list[int]]:
        packs = list[list[int]]()
        for start in range(0, len(tokens), buffer):
            stop, first, rooms = min(start + buffer, len(tokens)), len(packs), list[int]()
            for number in sorted(range(start, stop), key=lambda n: -tokens[n]):
                place = next(
                    (at for at, room in enumerate(rooms) if room >= tokens[number]), len(rooms)
                )
                if place == len(rooms):
                    rooms.append(token_budget)
                    packs.append([])
                rooms[place] -= tokens[number]
                packs[first + place].append(number)
        return packs

    return packing


PEERS: dict[str, Packing] = {
    "next-fit": next_fit,
    "FFD 16": first_fit_decreasing(16),
    "FFD 1000": first_fit_decreasing(1000),
}


def measured(
    packing: Packing, mixture: LengthMixture, samples: int, budget: int
) -> tuple[float, float, list[list[int]]]:
    """Fill, microseconds a sample, and the packs."""
    tokens, patches = (column.tolist() for column in fitting(mixture, samples))
    started = time.process_time()
    packs = packing(tokens, patches, mixture.sequence_length, budget)
    seconds = time.process_time() - started
    return sum(tokens) / mixture.sequence_length / len(packs), seconds / len(tokens) * 1e6, packs


# ---- goals


def fill(name: str, samples: int) -> list[Row]:
    """N5: share of the packs that is not padding, over whole blocks of a plan, their last packs included."""
    mixture, rows = MIXTURES[name], []
    peers = ", ".join(
        f"{peer} {measured(packing, mixture, samples, 1 << 40)[0]:.2%}"
        for peer, packing in PEERS.items()
    )
    for what, patches_per_token in (
        ("tokens only", 1e6),
        ("tokens and 3.2 patches a token", PATCHES_PER_TOKEN),
    ):
        plan = plan_of(mixture, samples, 8, patches_per_token=patches_per_token)
        blocks = [plan.block(number) for number in range(max(1, samples // plan.draws_per_block))]
        share = (
            sum(int(s.tokens.sum()) for s in blocks)
            / mixture.sequence_length
            / sum(map(len, blocks))
        )
        alone = patches_per_token == PATCHES_PER_TOKEN
        target = "" if alone else f">= {FILL[name]:.1%}"
        met = None if alone else share >= FILL[name]
        rows.append(
            Row(
                "N5",
                f"fill {name}, {what}",
                f"{share:.2%}",
                "" if alone else peers,
                target,
                met,
                {"ours": share},
            )
        )
    return rows


def planning_time(name: str, samples: int) -> Row:
    """N6: a block from draws to packs."""
    mixture = MIXTURES[name]
    plan = plan_of(mixture, samples, 8)
    plan.mixture.draws(0, plan.draws_per_block)
    started = time.process_time()
    packed = sum(len(plan._make_block(number).tokens) for number in range(2))
    cost = (time.process_time() - started) / packed * 1e6
    peers = ", ".join(
        f"{peer} {measured(packing, mixture, samples, 1 << 40)[1]:.1f}"
        for peer, packing in PEERS.items()
    )
    met = cost <= MICROSECONDS_PER_SAMPLE
    return Row(
        "N6",
        f"planning {name}, µs a sample",
        f"{cost:.1f}",
        f"packing alone: {peers}",
        "<= 10",
        met,
        {"ours_us": cost},
    )


def useful(name: str, samples: int) -> Row:
    """N7: share of the ranks' time that is work, with the operations of Qwen3-VL-8B."""
    mixture, ranks = MIXTURES[name], LAYOUTS[name]
    batch = ranks * PACKS_PER_RANK
    plan = plan_of(mixture, samples, batch)
    loads = np.array([rank_costs(deal(plan.step(step), ranks, 1)) for step in range(12)])
    share = loads.mean(1).sum() / loads.max(1).sum()
    peers = ", ".join(
        f"{peer} in order {in_order(measured(packing, mixture, samples, 1 << 40)[2], mixture, samples, ranks):.1%}"
        for peer, packing in PEERS.items()
        if peer != "next-fit"
    )
    worst = (loads.max(1) / loads.mean(1)).max()
    met = bool(share >= USEFUL[name] and worst <= WORST)
    target = f">= {USEFUL[name]:.0%}, max/mean <= {WORST:g}"
    what, numbers = (
        f"useful {name}, {ranks} ranks x 4 packs",
        {"ours": float(share), "worst": float(worst)},
    )
    return Row("N7", what, f"{share:.1%}, max/mean {worst:.3f}", peers, target, met, numbers)


def in_order(packs: list[list[int]], mixture: LengthMixture, samples: int, ranks: int) -> float:
    """The useful share if packs go to ranks as they come."""
    table = mixture.draw(samples).lengths
    table = table[
        (table["tokens"] <= mixture.sequence_length)
        & (table["patches"] <= int(PATCHES_PER_TOKEN * mixture.sequence_length))
    ]
    tokens = table["tokens"].astype(np.int64)
    work = np.stack(
        [tokens, tokens**2, table["patches"].astype(np.int64), table["patch_pairs"]], axis=1
    )
    costs = np.array([QWEN3VL_8B.of(work[pack].sum(0)) for pack in packs])
    steps = len(costs) // (ranks * PACKS_PER_RANK)
    loads = costs[: steps * ranks * PACKS_PER_RANK].reshape(steps, PACKS_PER_RANK, ranks).sum(1)
    return float(loads.mean(1).sum() / loads.max(1).sum())


@dataclass(frozen=True)
class Peer:
    """What megatron-energon was measured with on captions: CPU seconds from a state to its first pack, the state's bytes."""

    resume_seconds: float
    state_bytes: float


def resume(peer: Peer | None = None) -> list[Row]:
    """N8: from a state to the first pack, on shards with index and lengths at hand; beside going through the stream again."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        synthetic.make(Path(folder), captions=600, documents=60)
        whole = stream_of(Path(folder))
        for step in (37, 2003):
            state, fresh = json.loads(json.dumps(whole.state(step))), stream_of(Path(folder))
            shutil.rmtree(Path(folder) / "captions" / "cache" / "plan")
            started = time.perf_counter()
            fresh.load_state(state)
            fresh.micro_batches(step, Share(0, 8), 1)
            seconds = time.perf_counter() - started
            started = time.perf_counter()
            for block in range(state["block"] + 1):
                fresh.plan._make_block(block)
            replayed = time.perf_counter() - started
            peers = f"planning all before it {replayed:.2f}, reading it again more"
            peers = (
                f"{peer.resume_seconds:.2f} of CPU (energon, buffer 64), {peers}" if peer else peers
            )
            what = f"first pack (8K tokens, decoded) at step {step:,}, s"
            met = seconds <= RESUME_SECONDS
            rows.append(
                Row(
                    "N8",
                    what,
                    f"{seconds:.2f}",
                    peers,
                    "<= 0.5",
                    met,
                    {"ours_s": seconds, "replayed_s": replayed},
                )
            )
    return rows


def recaptioned(count: int, pictures: int = 1000) -> Iterator[synthetic.Pair]:
    """Captions, each of one of `pictures` photographs."""
    known = list(synthetic.captions(pictures))
    for number in range(count):
        sample, media = known[number % pictures]
        yield replace(sample, id=f"captions:{number}"), media


def counting(captions: int) -> Row:
    """N14: index and lengths of captions of a photograph, beside what needs the processor."""
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder) / "captions", "captions", recaptioned(captions))
        synthetic.make(Path(folder))
        started = time.process_time()
        for path in (Path(folder) / "captions").glob("*.tar"):
            index_shard(path)
        indexed = time.process_time()
        dataset = Dataset.open(Path(folder) / "captions", "captions")
        Counting(dataset, Tokenizer(str(Path(folder) / "tokenizer")), MediaConfig())(0, captions)
        counted = time.process_time()
        peer = processed(dataset, 200) * 1e6 / 60
    index, lengths = (
        (stop - start) / captions * 1e6 for start, stop in ((started, indexed), (indexed, counted))
    )
    minutes = (index + lengths) / 60
    ours = f"{minutes:.1f} (index {index:.0f} µs, lengths {lengths:.0f} µs a sample, {captions:,} of them)"
    peers = f"{peer:.0f} (lengths by Pillow and HF's processor, without index or tokens)"
    what = "index and lengths, CPU minutes for 1M captions"
    numbers = {"index_us": index, "lengths_us": lengths, "minutes": minutes, "peer_minutes": peer}
    return Row(
        "N14",
        what,
        ours,
        peers,
        f"<= {MINUTES_PER_MILLION:g}",
        minutes <= MINUTES_PER_MILLION,
        numbers,
    )


def processed(dataset: Dataset, count: int) -> float:
    """CPU seconds a sample to learn the grid as LLaVA-OneVision-1.5 does: the whole image processor."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(patch_size=16)
    started = time.process_time()
    for index in range(count):
        picture = Image.open(io.BytesIO(dataset.member(index, "img0.jpg"))).convert("RGB")
        processor(images=[picture], return_tensors="pt")["image_grid_thw"]
    return (time.process_time() - started) / count


def stream_of(folder: Path) -> PackStream:
    """Packs of 8,192 tokens of photographs with captions and of documents."""
    datasets = {
        name: DatasetConfig(str(folder / name), over_length="split")
        for name in ("captions", "documents")
    }
    data = DataConfig(str(folder / "tokenizer"), datasets, cache="")
    return PackStream(
        StreamOptions(data, "bench", 8192, 8, {"captions": 3, "documents": 1}, "sqrt", 1)
    )


def state_size(peer: Peer | None = None) -> Row:
    """N9: a state in the middle of a run over 20 datasets that goes on from an earlier phase."""
    sources, before = [], {}
    for number in range(20):
        name = f"quite_a_long_name_{number}"
        content = hashlib.sha256(name.encode()).hexdigest()[:16]
        before[content] = 10**9 + number
        parts = Parts(
            MIXTURES["8k"].draw(2000, number).lengths, np.empty(0, np.int64), np.empty(0, PART)
        )
        sources.append(MixtureEntry(name, 0.1 + number, parts, content, "truncate_tail"))
    settings = Settings(
        1234,
        "long_context",
        262_144,
        512,
        838_860,
        1024,
        64,
        0,
        64,
        "tokens",
        "12345678",
        "12345678",
    )
    size = len(json.dumps(Plan(sources, settings, origin=Origin(10_000, before)).state(10_002)))
    peers = "17-29 KB a rank (energon, published)"
    if peer:
        peers = f"{peer.state_bytes:,.0f} a rank (energon, buffer 64, 1 dataset)"
    what = "state, bytes in all, 20 datasets"
    return Row(
        "N9",
        what,
        f"{size:,}",
        peers,
        f"<= {STATE_BYTES:,}",
        size <= STATE_BYTES,
        {"ours_bytes": size},
    )


def rows(samples: int, captions: int, peer: Peer | None = None) -> Iterator[Row]:
    """N5 to N9 and N14; `samples` of each mixture, `captions` that are indexed and counted, what was measured of energon."""
    for name in MIXTURES:
        yield from fill(name, samples)
    yield from (planning_time(name, samples) for name in MIXTURES)
    yield from (useful(name, samples) for name in MIXTURES)
    yield from resume(peer)
    yield state_size(peer)
    yield counting(captions)


def main() -> None:
    """Measure and print the table; exits with 1 if a goal is not met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", type=int, default=40_000, help="of each mixture (default 40,000)"
    )
    parser.add_argument(
        "--captions", type=int, default=20_000, help="that are indexed and counted (default 20,000)"
    )
    arguments = parser.parse_args()
    found = list(rows(arguments.samples, arguments.captions))
    show(found)
    sys.exit(any(row.met is False for row in found))


if __name__ == "__main__":
    main()
