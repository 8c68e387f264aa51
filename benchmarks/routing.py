"""How long a mixture of experts trains alike in different layouts: losses and routing, step by step, against one process.

    python benchmarks/routing.py runs/demo-data [--steps 60] [--seeds 1234 1] [--scores fp32 fp64 grid]

Trains model=tiny_moe from random weights through the demo's phase `multimodal` in each layout, for every way to compute the
scores that experts are chosen by: `fp32` as the program does, `fp64` logits in double precision, `grid` logits rounded to
multiples of 2^-10 before the choice, equal ones to the lower number. Prints a table. Reference: one process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "expert 2": (2, ["parallel.expert=2"]),
    "tensor 2 x expert 2": (2, ["parallel.tensor=2", "parallel.expert=2"]),
}
SCORES = ("fp32", "fp64", "grid")
GRID = 2.0**-10
OTHER_PHASES = ("language", "towers", "align", "long", "ultra", "sft", "reasoning", "rl")


def words(seed: int, layout: str) -> list[str]:
    """The command line of a run."""
    own = ["phases.multimodal.micro_batch=1", f"run.seed={seed}", "run.deterministic=true"]
    return [
        "+recipe=demo",
        "model=tiny_moe",
        *(f"~phases.{name}" for name in OTHER_PHASES),
        *own,
        *LAYOUTS[layout][1],
    ]


def main() -> None:
    """Run every layout under torchrun and print how far each is from one process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="the demo's data: python launch/data.py demo DIR")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234, 1])
    parser.add_argument("--scores", nargs="+", default=["fp32"], choices=SCORES)
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "VISIONLOOM_DEMO_DATA": str(options.data.resolve()),
        "PYTHONPATH": str(root / ".link"),
    }
    at = sorted(
        {step for step in (10, 20, 30, 36, 40, 60) if step < options.steps} | {options.steps}
    )
    print("| scores | seed | layout | first step routed otherwise | tokens then, of | margin of their logits | up to that step | "
          + " | ".join(f"loss to step {step}" for step in at) + " |\n|" + "---|" * (7 + len(at)))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for scores in options.scores:
            for seed in options.seeds:
                found = {}
                for layout, (ranks, _) in LAYOUTS.items():
                    start = [
                        sys.executable,
                        "-m",
                        "torch.distributed.run",
                        "--standalone",
                        "--nproc-per-node",
                        str(ranks),
                        __file__,
                    ]
                    own = ["--rank", folder, scores, str(seed), str(options.steps), layout]
                    subprocess.run(
                        [*start, *own], env={**environment, "OMP_NUM_THREADS": "1"}, check=True
                    )
                    found[layout] = [
                        dict(np.load(Path(folder) / f"{rank}.npz")) for rank in range(ranks)
                    ]
                    if ranks > 1:
                        cells = compare(found["one process"], found[layout], at)
                        print(f"| {scores} | {seed} | {layout} | {' | '.join(cells)} |", flush=True)


def compare(alone: list[dict[str, Any]], others: list[dict[str, Any]], at: list[int]) -> list[str]:
    """Cells of a row: the first step with another choice of experts, how many tokens, their margins, and losses' distances."""
    distance = np.abs(others[0]["losses"] / alone[0]["losses"] - 1)
    first, told = len(distance) + 1, ["none", "", "", ""]
    for step in range(1, len(distance) + 1):
        expected, found = _choices(alone, step), _choices(others, step)
        assert expected.keys() == found.keys(), "the layouts have read different packs"
        different = {key: (found[key][0] != expected[key][0]).any(axis=0) for key in expected}
        if any(flips.any() for flips in different.values()):
            first, count = step, sum(int(flips.sum()) for flips in different.values())
            layers = [
                np.where(found[key][0] != expected[key][0], expected[key][1], np.inf)
                for key in expected
            ]
            margins = np.concatenate([part.min(axis=1) for part in layers])
            total = sum(flips.size for flips in different.values())
            told = [
                str(first),
                f"{count} of {total}",
                f"{margins.min():.0e}",
                f"{distance[: first - 1].max(initial=0):.1e}",
            ]
            break
    if first > len(distance):
        told[3] = f"{distance.max():.1e}"
    return [*told, *(f"{distance[:step].max():.1e}" for step in at)]


def _choices(
    ranks: list[dict[str, Any]], step: int
) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """By pack: chosen experts as bits and margins, [layers, tokens] each; ranks that share a pack have parts of its tokens."""
    parts: dict[str, list[tuple[NDArray[Any], NDArray[Any]]]] = {}
    for rank in ranks:
        for name in rank:
            if name.startswith(f"{step}/") and name.endswith("/chosen"):
                key = name.split("/")[1]
                parts.setdefault(key, []).append(
                    (rank[name], rank[name.replace("chosen", "margin")])
                )
    return {
        key: tuple(np.concatenate(part, axis=1) for part in zip(*pair, strict=True))
        for key, pair in parts.items()
    }  # type: ignore[misc]


def choose_as(scores: str) -> None:
    """Let routers compute the scores that experts are chosen by in another way than the program does."""
    import torch
    from torch import Tensor

    from visionloom.model import experts

    choose = experts.topk_routing_with_score_function
    precise: list[Tensor] = []

    def in_double(self: Any, tokens: Tensor) -> Tensor:
        precise[:] = [tokens.reshape(-1, tokens.shape[-1]).double() @ self.weight.double().t()]
        return precise[0].float().view(*tokens.shape[:-1], -1)

    def by_double(logits: Tensor, topk: int, **options: Any) -> tuple[Tensor, Tensor]:
        largest = precise[0].topk(topk, dim=1)
        empty = torch.zeros_like(precise[0])
        weights = empty.scatter(1, largest.indices, largest.values.softmax(dim=1))
        return weights.float(), empty.scatter(1, largest.indices, 1.0).bool()

    def on_grid(logits: Tensor, topk: int, **options: Any) -> tuple[Tensor, Tensor]:
        places = (
            (logits.detach() / GRID)
            .round()
            .sort(dim=1, descending=True, stable=True)
            .indices[:, :topk]
        )
        chosen: tuple[Tensor, Tensor] = choose(logits, topk, precomputed_indices=places, **options)
        return chosen

    if scores == "fp64":
        experts.Router.gating = in_double  # type: ignore[method-assign]
        experts.topk_routing_with_score_function = by_double
    elif scores == "grid":
        experts.topk_routing_with_score_function = on_grid


def run_rank(folder: Path, scores: str, seed: int, steps: int, layout: str) -> None:
    """Train on this rank and write losses, choices and margins."""
    from visionloom.common.quiet import quiet_libraries
    from visionloom.launch.configure import compose

    quiet_libraries()
    import torch
    from torch import Tensor

    from visionloom.model import experts
    from visionloom.train.build import build_model, build_stream, build_trainer, open_topology
    from visionloom.train.loop import step_batches
    from visionloom.train.step import train_step

    config = compose(words(seed, layout))
    assert config is not None
    topology = open_topology(config)
    chunks = build_model(config, topology, drawn=True)
    stream = build_stream(config, "multimodal", folder, topology)
    trainer = build_trainer(config, "multimodal", topology, chunks, stream)
    seen: list[tuple[Tensor, Tensor]] = []
    routing = experts.Router.routing

    def watch(
        self: Any, logits: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weights, chosen = routing(self, logits, padding_mask)
        largest = logits.detach().view(-1, logits.shape[-1]).topk(self.topk + 1).values
        bits = (chosen.long() << torch.arange(chosen.shape[1])).sum(1)
        seen.append((bits.short(), largest[:, -2] - largest[:, -1]))
        return weights, chosen

    experts.Router.routing = watch  # type: ignore[method-assign]
    choose_as(scores)
    found: dict[str, Any] = {}
    losses = []
    for step, batches in enumerate(islice(step_batches(trainer, 0), steps), 1):
        seen.clear()
        losses.append(train_step(trainer, batches).loss)
        layers = len(seen) // len(batches)
        for place, batch in enumerate(batches):
            key = f"{step}/{zlib.crc32(batch.input_ids.numpy().tobytes()):08x}"
            own = seen[place * layers : (place + 1) * layers]
            found[f"{key}/chosen"] = torch.stack([bits for bits, _ in own]).numpy()
            found[f"{key}/margin"] = torch.stack([margin for _, margin in own]).numpy()
    np.savez(folder / f"{topology.rank}.npz", losses=np.array(losses), **found)
    topology.barrier()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        run_rank(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
    else:
        main()
