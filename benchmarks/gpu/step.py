"""Time a train step of a recipe on this machine's GPUs, on packs of a stated mixture with random content.

    python benchmarks/gpu/step.py +recipe=full/qwen3vl_2b parallel=single

The words are those of a recipe, whose first phase is timed; under torchrun it is timed on all ranks. `--steps N` (5) after two
that are not counted, `--profile` for the kernels of one step, `--out FILE` for the numbers as JSON. Weights are random: a
step's time does not depend on them but for a mixture's routing, which random weights make nearly even.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from visionloom.data.stream.batch import PackedBatch
from visionloom.forecast.imagine import ImaginedStream
from visionloom.forecast.packs import PackChoice, packs_for, with_content
from visionloom.launch.configure import compose
from visionloom.launch.environment import world_size
from visionloom.model.lora import apply_lora
from visionloom.parallel import topology as topologies
from visionloom.parallel.topology import Topology
from visionloom.train.build import build_model, build_trainer, open_topology
from visionloom.train.config import RunConfig
from visionloom.train.observe.metrics import memory_gib, peak_flops
from visionloom.train.phase.trainer import PhaseTrainer
from visionloom.train.step import train_step
from visionloom.train.step_sums import StepCounts

UNCOUNTED = 2
"""First steps, in which kernels are chosen and compiled and memory is taken."""


def trainer_of(
    config: RunConfig, phase: str, topology: Topology, batch: PackedBatch
) -> PhaseTrainer:
    """Build a phase's trainer with random weights and no data of its own."""
    parts = build_model(config, topology, drawn=False)
    scale = 0.02
    with torch.no_grad():
        for part in parts:
            for parameter in part.parameters():
                one = parameter.dim() == 1
                parameter.fill_(1.0) if one else parameter.normal_(0.0, scale)
    if config.lora.rank:
        apply_lora(parts, config.lora, topology, config.run.seed)
    stream: Any = ImaginedStream(batch.dataset_names)
    return build_trainer(config, phase, topology, parts, stream)


def measure(config: RunConfig, steps: int, profile: bool) -> dict[str, Any]:
    """Return times, memory and utilisation of steps on this rank."""
    phase = next(iter(config.phases))
    topology = open_topology(config)
    settings = config.phases[phase]
    packs = packs_for(config, phase, topology.world_size, [PackChoice.MEAN])[PackChoice.MEAN]
    number = settings.global_batch // topology.data_size // settings.micro_batch
    one = with_content(packs.batch(topology.share), config.model.text.vocab_size, 0)
    batches = [one] * number
    trainer = trainer_of(config, phase, topology, one)

    seconds = []
    for _ in range(UNCOUNTED + steps):
        topology.barrier()
        begun = time.perf_counter()
        train_step(trainer, batches)
        synchronize(topology.device)
        seconds.append(time.perf_counter() - begun)
    if profile and topology.is_main:
        show_profile(trainer, batches)
    median = sorted(seconds[UNCOUNTED:])[steps // 2]

    counts = StepCounts.of(batches, len(batches) * settings.micro_batch)
    flops, peak = trainer.flops(counts.work), peak_flops(topology.device)
    on_gpu = topology.device.type == "cuda"
    return {
        "recipe": config.run.name,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "ranks": topology.world_size,
        "packs": f"{number} x {packs.assumed}",
        "first_seconds": seconds[:UNCOUNTED],
        "step_seconds": median,
        "worst_seconds": max(seconds[UNCOUNTED:]),
        "real_tokens_per_second": counts.tokens / median,
        "tflops_per_second": flops / median / 1e12,
        "mfu": flops / median / peak if peak else None,
        "peak_gib": memory_gib(topology.device),
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
    }


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show_profile(trainer: PhaseTrainer, batches: list[PackedBatch]) -> None:
    """Print the kernels of one step that take most time, with their counts."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profiler:
        train_step(trainer, batches)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type.name == "CUDA":
            entry = kernels.setdefault(event.name, [0, 0.0])
            entry[0] += 1
            entry[1] += event.device_time_total / 1e3
    total = sum(each[1] for each in kernels.values())
    print(f"{total:9.2f} ms {sum(int(each[0]) for each in kernels.values()):6d} kernels in all")
    for name, (count, milliseconds) in sorted(kernels.items(), key=lambda each: -each[1][1])[:40]:
        print(f"{milliseconds:9.2f} ms {int(count):6d} x {name[:110]}")


def main(argv: Sequence[str]) -> None:
    """Time the recipe of the command line and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path)
    options, words = parser.parse_known_args(argv)
    config = compose(words, world_size())
    result = measure(config, options.steps, options.profile)
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    topologies.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
