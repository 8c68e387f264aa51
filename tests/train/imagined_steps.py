"""Steps of the project's own on imagined CUDA. `python -m` this module prints, as JSON, what each named step did.

A process of its own, with the library of tests/forecast/trace/imagined_cuda.c.
"""

import contextlib
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch

from visionloom.common.quiet import quiet_libraries
from visionloom.forecast.imagine import trace_rank, trace_with
from visionloom.forecast.trace.events import RankTrace
from visionloom.forecast.trace.step import recording, trace_step
from visionloom.launch.configure import compose
from visionloom.model.config import ModelConfig
from visionloom.model.language import LanguageModel
from visionloom.parallel import topology as topologies
from visionloom.parallel.stand_in import META
from visionloom.tests.forecast.batches import pictured_pack
from visionloom.tests.forecast.imagined import flops, host_wait, launches, mask_on_the_host
from visionloom.tests.forecast.trace.imagined_cuda import CUDA, imagined_cuda
from visionloom.tests.train.layouts import Case, Layout, build, deal, packs_of


@dataclass(frozen=True)
class Sized(Case):
    """A case of a tiny model with other sizes."""

    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def model(self) -> ModelConfig:
        """The tiny model with these sizes of its language model."""
        config = super().model
        return replace(config, text=replace(config.text, **self.sizes))


@dataclass(frozen=True)
class Step:
    """A step of one rank."""

    layout: Layout
    micro_batches: int = 1
    mistake: Callable[[], Any] = contextlib.nullcontext
    """A context in which the step has a mistake."""


def mistaken_hidden(mistake: Callable[[Any], Any]) -> Any:
    """Make a mistake with the hidden states before the decoder layers."""
    forward: Any = LanguageModel.forward

    def changed(model: Any, hidden: Any, *others: Any) -> Any:
        return forward(model, mistake(hidden), *others)

    return mock.patch.object(LanguageModel, "forward", changed)


def unpinned() -> Any:
    """Send micro-batches from memory that is not pinned."""
    return mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)


def layers(number: int, experts: int = 0) -> Sized:
    return Sized(experts=experts, sizes={"layers": number})


MIXTURE = Case(experts=8)
NARROW = Sized(experts=8, sizes={"expert_ffn_hidden_size": 12})
STEPS = {
    "dense": Step(Layout(2, {})),
    "dense, more": Step(Layout(2, {}, layers(6)), 3),
    "mixture": Step(Layout(2, {}, MIXTURE)),
    "mixture, more": Step(Layout(2, {}, layers(6, experts=8)), 3),
    "mixture, expert 2": Step(Layout(2, {"expert": 2}, MIXTURE)),
    "mixture, expert 2, more": Step(Layout(2, {"expert": 2}, layers(6, experts=8)), 3),
    "adapters": Step(Layout(2, {}, Case(lora=True)), 2),
    "recompute full": Step(Layout(2, {"recompute": "full"}), 2),
    "tensor 2": Step(Layout(4, {"tensor": 2}), 2),
    "context 2": Step(Layout(4, {"context": 2}), 2),
    "activations in host memory": Step(Layout(2, {"offload_activations": True}), 2),
    "a mask on the host": Step(Layout(2, {}), 1, lambda: mistaken_hidden(mask_on_the_host)),
    "a look at a value": Step(Layout(2, {}), 3, lambda: mistaken_hidden(host_wait)),
    "unpinned memory": Step(Layout(2, {}), 1, unpinned),
    "experts 12 wide": Step(Layout(2, {}, NARROW)),
}


def run(step: Step, on: torch.device) -> RankTrace:
    """Run a step of rank 0 in bf16 on imagined CUDA, or on `meta` as a forecast does."""
    layout = step.layout
    topology = topologies.imagine(layout.config, layout.ranks, 0, on)
    packs = packs_of(layout.case.content) * layout.ranks * step.micro_batches
    mine: Any = deal(packs, topology, layout.one_encoder)[: step.micro_batches]
    imagining: Any = imagined_cuda() if on == CUDA else recording(META)
    try:
        with imagining as recorder, step.mistake():
            trainer = build(layout, True, topology, torch.bfloat16)
            return trace_step(recorder, trainer, mine)
    finally:
        topologies.stop()


def run_8b(on: torch.device) -> RankTrace:
    """Run a step of the whole 8B in its recipe's layout, as rank 0 of 8."""
    config = compose(["+recipe=full/qwen3vl_8b"], 8)
    assert config is not None
    phase = next(iter(config.phases))
    encoders = config.parallel.encoder_ranks
    pack = pictured_pack(config.phases[phase].sequence_length, 12, (32, 40), encoders)
    packs = [pack, pack]
    if on == META:
        return trace_rank(config, phase, 8, 0, packs)
    topology = topologies.imagine(config.parallel, 8, 0, on)
    try:
        with imagined_cuda() as recorder:
            return trace_with(recorder, config, phase, topology, packs)
    finally:
        topologies.stop()


def waits(trace: RankTrace) -> dict[str, int]:
    """How often the host waits in a step, by kind, file and function."""
    counts: Counter[str] = Counter()
    for wait in trace.waits:
        file, _, function = wait.place.partition(" ")
        counts[f"{wait.kind}: {file.partition(':')[0]} {function}"] += wait.count
    return dict(counts)


def report(name: str) -> dict[str, Any]:
    """Return the waits of a step and what differs from its trace on `meta`; for a step that is refused, the error."""
    step = run_8b if name == "8B" else functools.partial(run, STEPS[name])
    try:
        trace = step(CUDA)
    except RuntimeError as error:
        return {"error": str(error)}
    other = step(META)
    differences = (launches(trace) - launches(other)) + (launches(other) - launches(trace))
    return {
        "waits": waits(trace),
        "mixed": len(trace.mixed),
        "waits of the forecast": waits(other),
        "launches": sum(launches(trace).values()),
        "launches that differ": [str(key) for key in differences],
        "same flops": flops(trace) == flops(other),
        "peaks": [trace.peak.bytes, other.peak.bytes],
    }


if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps({name: report(name) for name in sys.argv[1:] or STEPS}))
