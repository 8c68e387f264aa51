"""Time a train step beside transformers' model on one CPU core: the same packs, weights and losses, as a ratio of CPU time.

    python benchmarks/cpu/step.py [--data runs/demo-data] [--seeds 3] [--rounds 5] [--model demo|larger] [--out FILE]

Theirs in two ways: `padded`, as most trainers do: a row a sample, padded to the longest, with logits of all tokens; and `packed`,
one row with a mask of blocks and logits of supervised tokens alone. Both have torch's AdamW, fused unless `--adamw default`,
and clipping. `make demo` makes the data.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from visionloom.common.quiet import quiet_libraries
from visionloom.data.encode.patches import VIDEO_ROW, widen
from visionloom.data.stream.batch import PackedBatch
from visionloom.launch.configure import compose
from visionloom.parallel import topology as topologies
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import huggingface_model, load_reference
from visionloom.tests.train.runs import run_words
from visionloom.train.build import build_model, build_stream, build_trainer, open_topology
from visionloom.train.config import RunConfig
from visionloom.train.phase.trainer import PhaseTrainer
from visionloom.train.step import train_step

PHASE = "multimodal"
MODELS = {
    "demo": [],
    "larger": [
        "model.text.hidden_size=512",
        "model.text.ffn_hidden_size=1536",
        "model.text.layers=6",
        "model.text.heads=8",
        "model.text.kv_heads=4",
        "model.text.head_dim=64",
        "model.text.mrope_section=[12,10,10]",
        "model.vision.hidden_size=256",
        "model.vision.ffn_hidden_size=768",
    ],
}
"""Words that make the demo's model another one."""
CLOSE = 2e-4
"""Largest relative difference of the losses of a step."""


def demo_run(data: Path, seed: int, more: Sequence[str]) -> RunConfig:
    """Return the demo's phase on all kinds of its data, without warming up, as `seed` draws its packs."""
    words = run_words(data.resolve(), Path("runs/benchmark"), 100, f"run.seed={seed}", *more)
    words += [f"phases.{PHASE}.sequence_length=512", "run.threads=1"]
    config = compose(words, 1)
    assert config is not None
    return config


@dataclass(frozen=True)
class TheirBatch:
    """A micro-batch as transformers' model takes it, and the tokens that its loss is of."""

    arguments: dict[str, Any]
    rows: Tensor
    """Supervised tokens among those of all rows, int64."""
    labels: Tensor
    weights: Tensor
    whole_logits: bool = False
    """Logits of all tokens, as transformers computes them where it is given labels."""

    def loss_sum(self, model: Any) -> Tensor:
        """Return the weighted sum of losses."""
        hidden = model.model(**self.arguments).last_hidden_state.flatten(0, 1)
        if self.whole_logits:
            logits = model.lm_head(hidden)[self.rows]
        else:
            logits = model.lm_head(hidden[self.rows])
        losses = F.cross_entropy(logits, self.labels, reduction="none")
        return (losses * self.weights).sum()


def visual_arguments(batch: PackedBatch) -> dict[str, Any]:
    """Return pictures as their model takes them: fp32, with two frames a patch."""
    if not len(batch.patches):
        return {}
    patches = torch.from_numpy(widen(batch.patches.numpy(), VIDEO_ROW))
    return {"pixel_values": patches.float() / 127.5 - 1.0, "image_grid_thw": batch.grid_thw.long()}


def token_ids(batch: PackedBatch, image_token: int) -> Tensor:
    """Return ids with the image's token also where the features of videos go."""
    ids = batch.input_ids.clone()
    ids[batch.visual_rows] = image_token
    return ids


def packed(batch: PackedBatch, image_token: int) -> TheirBatch:
    """Return one row, with a mask by which a sample sees itself only."""
    lengths = batch.cu_seqlens.diff().long()
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    same = numbers[:, None] == numbers[None, :]
    arguments = {
        "input_ids": token_ids(batch, image_token)[None],
        "position_ids": batch.position_ids[:, None].long(),
        "attention_mask": (same & torch.ones_like(same).tril())[None, None],
        "use_cache": False,
        **visual_arguments(batch),
    }
    rows = (batch.loss_weights > 0).nonzero()[:, 0]
    return TheirBatch(arguments, rows, batch.labels[rows], batch.loss_weights[rows])


def padded(batch: PackedBatch, image_token: int) -> TheirBatch:
    """Return a row a sample, padded to the longest of the micro-batch."""
    ids = token_ids(batch, image_token)
    bounds = batch.cu_seqlens.tolist()
    # What fills a pack is no sample.
    samples = []
    for first, last in pairwise(bounds):
        if last > first and not batch.padding_mask[first]:
            samples.append(range(first, last))
    longest = max(map(len, samples))
    shape = len(samples), longest
    input_ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    positions = torch.zeros(3, *shape, dtype=torch.long)
    places = torch.full((len(ids),), -1)
    for number, sample in enumerate(samples):
        own = slice(sample.start, sample.stop)
        input_ids[number, : len(sample)] = ids[own]
        mask[number, : len(sample)] = 1
        positions[:, number, : len(sample)] = batch.position_ids[:, own]
        places[own] = torch.arange(len(sample)) + number * longest
    arguments = {
        "input_ids": input_ids,
        "position_ids": positions,
        "attention_mask": mask,
        "use_cache": False,
        **visual_arguments(batch),
    }
    rows = (batch.loss_weights > 0).nonzero()[:, 0]
    labels, weights = batch.labels[rows], batch.loss_weights[rows]
    return TheirBatch(arguments, places[rows], labels, weights, whole_logits=True)


class TheirTraining:
    """transformers' model with torch's AdamW and clipping."""

    def __init__(
        self, config: RunConfig, state: dict[str, Tensor], image_token: int, fused: bool
    ) -> None:
        self.model = huggingface_model(config.model, image=image_token, video=image_token + 1)
        self.model.load_state_dict(state)
        optim = config.optim
        self.clip = optim.clip_grad
        rate = config.phases[PHASE].lr
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, weight_decay=optim.weight_decay, fused=fused
        )

    def step(self, batches: list[TheirBatch]) -> float:
        """Train one step and return its loss."""
        weight = sum(batch.weights.sum() for batch in batches)
        total = 0.0
        for batch in batches:
            loss = batch.loss_sum(self.model) / weight
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def measure(config: RunConfig, topology: Topology, rounds: int, fused: bool) -> dict[str, Any]:
    """Return the CPU seconds of each way to take the same steps, after their losses were found equal."""
    stream = build_stream(config, PHASE, Path("runs/benchmark"), topology)
    phase = config.phases[PHASE]
    steps = []
    for step in range(rounds + 1):
        steps.append(stream.micro_batches(step, topology.share, phase.micro_batch))
    # The pictures' own token, which no text has: theirs finds them by it.
    first = steps[0][0]
    image = int(first.input_ids[first.visual_rows[0]])

    parts = build_model(config, topology, drawn=False)
    torch.manual_seed(config.run.seed)
    state = huggingface_model(config.model, image=image, video=image + 1).state_dict()
    load_reference(parts[0], state, config.model, topology)
    trainer = build_trainer(config, PHASE, topology, parts, stream)
    theirs = {name: TheirTraining(config, state, image, fused) for name in ("padded", "packed")}
    makers = {"padded": padded, "packed": packed}

    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *makers)}
    tokens: dict[str, int] = {"ours": 0, "padded": 0, "packed": 0}
    for number, batches in enumerate(steps):
        losses, taken = {}, {}
        losses["ours"], taken["ours"] = timed(partial(own_step, trainer, batches))
        tokens["ours"] += sum(batch.real_tokens for batch in batches)
        for name, maker in makers.items():
            # Made before: ours has read its packs too.
            made = [maker(batch, image) for batch in batches]
            losses[name], taken[name] = timed(partial(theirs[name].step, made))
            tokens[name] += sum(each.arguments["input_ids"].numel() for each in made)
        # Later losses part: learning rates warm up in ours, and Adam's first steps amplify rounding.
        if number == 0:
            for name in makers:
                difference = abs(losses[name] / losses["ours"] - 1)
                assert difference < CLOSE, (name, losses)
            continue
        for name, value in taken.items():
            seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": medians,
        "tokens_computed": tokens,
        "ratios": {name: medians[name] / medians["ours"] for name in makers},
        "worst_ratios": {name: min(map(divide, seconds[name], seconds["ours"])) for name in makers},
    }


def own_step(trainer: PhaseTrainer, batches: list[PackedBatch]) -> float:
    """Train one step of ours and return its loss."""
    return train_step(trainer, batches).loss


def divide(numerator: float, denominator: float) -> float:
    """Return a quotient."""
    return numerator / denominator


def timed(function: Callable[[], float]) -> tuple[float, float]:
    """Return a result and the CPU seconds of this process."""
    begun = time.process_time()
    result = function()
    return result, time.process_time() - begun


def main() -> None:
    """Measure all seeds and print the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo-data"))
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--adamw", choices=("fused", "default"), default="fused", help="which of torch's is theirs"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet_libraries()
    transformers.logging.set_verbosity_error()

    results = []
    topology = None
    for seed in range(1, options.seeds + 1):
        config = demo_run(options.data, seed, MODELS[options.model])
        topology = topology or open_topology(config)
        result = measure(config, topology, options.rounds, options.adamw == "fused")
        results.append(result)
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["ratios"].items())
        shown = ", ".join(f"{name} {value:.3f}" for name, value in result["seconds"].items())
        print(f"seed {seed}: CPU seconds a step {shown}; theirs over ours: {ratios}", flush=True)
    for name in ("padded", "packed"):
        ratios = [result["ratios"][name] for result in results]
        worst = min(result["worst_ratios"][name] for result in results)
        median = statistics.median(ratios)
        print(
            f"ours is {median:.2f} times as fast as transformers {name}"
            f" (worst seed {min(ratios):.2f}, worst step {worst:.2f})"
        )
    if options.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        about = {
            "model": options.model,
            "adamw": options.adamw,
            "machine": platform.machine(),
            **versions,
        }
        options.out.write_text(json.dumps({**about, "seeds": results}, indent=1) + "\n")
    topologies.stop()


if __name__ == "__main__":
    main()
