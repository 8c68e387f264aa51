"""Check training on a device: the tiny model's losses and gradients, its slope, and steps with a resume.

Packs are of a stated mixture with random content, so that no data is needed.
"""

import functools
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionloom.common.quiet import quiet_libraries
from visionloom.data.stream.batch import PackedBatch
from visionloom.forecast.imagine import ImaginedStream
from visionloom.forecast.packs import PackChoice, packs_for, with_content
from visionloom.launch.check_parts.results import CheckResult, attempt, guarded
from visionloom.launch.configure import compose
from visionloom.launch.environment import ALONE
from visionloom.parallel import topology as topologies
from visionloom.parallel.share import ALONE as ALONE_SHARE
from visionloom.parallel.topology import Topology
from visionloom.train.build import build_model, build_trainer
from visionloom.train.checkpoint import read as checkpoint
from visionloom.train.checkpoint.write import Saver
from visionloom.train.config import CheckpointConfig, RunConfig
from visionloom.train.phase.trainer import PhaseTrainer
from visionloom.train.step import compute_gradients, open_sums, train_step

PHASE: Final = "multimodal"
STEPS: Final = 4
"""Half of them before the resume."""
LIMITS: Final = {"fp32": (1e-4, 1e-3), "bf16": (1e-2, 1e-1)}
"""Of the loss and of the gradients, against fp32 on a CPU: bf16 rounds to 0.4 %, in some thirty products one after the other."""
STEP_OF_SLOPE: Final = 1e-2
"""Length of the way on which the slope is measured, for weights of norm 58."""
LIMIT_OF_SLOPE: Final = 3e-2

Arrays = dict[str, NDArray[np.float32]]
"""Tensors by name, as they go from process to process."""


@dataclass(frozen=True)
class TinyResult:
    """Loss and gradients of the tiny model, the weights that they are of, and the losses of steps from there."""

    loss: float
    weights: Arrays
    gradients: Arrays
    curve: tuple[float, ...] = ()


def tiny_run(precision: str, device: str, world_size: int = 1, *more: str) -> RunConfig:
    """Return the demo's run cut to one phase, on packs of a mixture; `more` words are for Hydra."""
    others = ("language", "towers", "align", "long", "ultra", "sft", "reasoning", "rl")
    words = [
        "+recipe=demo",
        "model=tiny",
        # Muon multiplies in bf16 on a GPU: its losses would not be those of a CPU.
        "optim=adamw",
        f"run.device={device}",
        f"run.precision={precision}",
        # A place that nothing can be in: whatever data is here, the packs must be the same on all machines.
        "data.tokenizer=/dev/null/tokenizer",
        f"phases.{PHASE}.warmup_steps=1",
        f"phases.{PHASE}.sequence_length=256",
        f"phases.{PHASE}.global_batch={2 * world_size}",
        *(f"~phases.{name}" for name in others),
        *more,
    ]
    config = compose(words, world_size)
    assert config is not None
    return config


class CheckStream(ImaginedStream):
    """The names of datasets, and a place in the data that says nothing."""

    def state(self, step: int) -> dict[str, Any]:
        """Return the place after a step of the phase."""
        return {"step": step}


@dataclass
class TinyTraining:
    """The tiny model with random weights of one seed, its trainer and its micro-batches."""

    trainer: PhaseTrainer
    batches: list[PackedBatch]

    @classmethod
    def build(cls, config: RunConfig, topology: Topology) -> "TinyTraining":
        """Build them; every copy of the model gets the same packs, whatever the layout."""
        alone = tiny_run(config.run.precision, config.run.device)
        packs = packs_for(alone, PHASE, 1, [PackChoice.MEAN])[PackChoice.MEAN]
        whole = with_content(packs.batch(ALONE_SHARE), config.model.text.vocab_size, seed=0)
        batch = packs.batch(topology.share)
        # Each rank has the pictures that it encodes.
        mine = batch.encoder_ranks == topology.share.encoder_rank
        patches = whole.patches[mine.repeat_interleave(whole.grid_thw.prod(1))]
        batch = replace(whole, patches=patches, encoder_ranks=batch.encoder_ranks)
        parts = build_model(config, topology, drawn=True)
        stream: Any = CheckStream(batch.dataset_names)
        return cls(build_trainer(config, PHASE, topology, parts, stream), [batch])

    @property
    def parameters(self) -> dict[str, Any]:
        """Return the parameters of a model that is whole on this rank, by name."""
        return dict(self.trainer.model_parts[0].named_parameters())

    def loss_and_gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Compute the loss and its gradients; weights stay as they are."""
        sums = open_sums(self.trainer, self.batches)
        compute_gradients(self.trainer, self.batches, sums)
        # Megatron-core's DDP keeps them in a sum of its own, fp32.
        gradients = {}
        for name, parameter in self.parameters.items():
            gradients[name] = parameter.main_grad.clone()
        return sums.totals().loss, gradients

    def move(self, direction: dict[str, Tensor], length: float) -> None:
        """Move the weights by a multiple of a direction."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.add_(direction[name].to(parameter.dtype), alpha=length)

    def steps(self, number: int) -> list[float]:
        """Train some steps and return their losses."""
        return [train_step(self.trainer, self.batches).loss for _ in range(number)]


def norm(tensors: dict[str, Tensor]) -> float:
    """Return the norm of all tensors together."""
    norms = [each.double().norm() for each in tensors.values()]
    return float(torch.stack(norms).norm())


def check_training(topology: Topology) -> Iterator[CheckResult]:
    """Yield the checks of a single process on its device; on a GPU against a CPU, on a CPU bf16 against fp32."""
    device = topology.device.type
    reference = reference_on_cpu() if device == "cuda" else tiny_result("cpu", topology)
    for precision, (of_loss, _) in LIMITS.items():
        config = tiny_run(precision, device)
        if device == "cuda" or precision != "fp32":
            name = f"tiny model in {precision}"
            yield from guarded(name, check_against, reference, config, topology)
        name = f"{STEPS} steps in {precision} and the same with a resume in the middle"
        # A GPU adds gradients of attention in an order of its own each time.
        limit = of_loss if device == "cuda" else 0.0
        yield attempt(name, limit, functools.partial(resumed, config, topology))
    yield attempt("gradients and the slope of the loss", LIMIT_OF_SLOPE, lambda: slope(topology))


def check_against(
    reference: TinyResult, config: RunConfig, topology: Topology
) -> Iterator[CheckResult]:
    """Yield the comparison of loss and gradients with those of fp32 on a CPU."""
    precision, device = config.run.precision, config.run.device
    of_loss, of_gradients = LIMITS[precision]
    name = f"tiny model in {precision} on {device} and in fp32 on cpu"
    training = TinyTraining.build(config, topology)
    with torch.no_grad():
        for each, parameter in training.parameters.items():
            parameter.copy_(torch.from_numpy(reference.weights[each]))
    loss, gradients = training.loss_and_gradients()

    expected = {name: torch.from_numpy(each) for name, each in reference.gradients.items()}
    differences = {name: gradients[name].cpu() - each for name, each in expected.items()}
    yield CheckResult(f"loss: {name}", abs(loss / reference.loss - 1), of_loss)
    yield CheckResult(f"gradients: {name}", norm(differences) / norm(expected), of_gradients)


def resumed(config: RunConfig, topology: Topology) -> float:
    """Return the largest relative difference of losses between steps in one go and with a resume in the middle."""
    half = STEPS // 2
    # Three models of one seed: a third that kept its own weights would part from the first at once.
    straight = TinyTraining.build(config, topology).steps(STEPS)
    first = TinyTraining.build(config, topology)
    losses = first.steps(half)
    with tempfile.TemporaryDirectory(prefix="visionloom-check-") as name:
        saver = Saver(Path(name), CheckpointConfig(asynchronous=False), lambda *_, **__: None)
        saver.save(first.trainer, half, half, last=True)
        second = TinyTraining.build(config, topology)
        saved = checkpoint.read(checkpoint.folder_of(Path(name), PHASE, half))
        checkpoint.load_trainer(saved, second.trainer)
    losses += second.steps(STEPS - half)
    pairs = zip(losses, straight, strict=True)
    return max(abs(loss / expected - 1) for loss, expected in pairs)


def slope(topology: Topology) -> float:
    """Return how far the norm of the gradients is from the slope of the loss along them, in fp32."""
    training = TinyTraining.build(tiny_run("fp32", topology.device.type), topology)
    _, gradients = training.loss_and_gradients()
    steepest = norm(gradients)
    direction = {name: each / steepest for name, each in gradients.items()}
    # On both sides: what curves the loss falls out.
    training.move(direction, STEP_OF_SLOPE)
    above, _ = training.loss_and_gradients()
    training.move(direction, -2 * STEP_OF_SLOPE)
    below, _ = training.loss_and_gradients()
    return abs((above - below) / (2 * STEP_OF_SLOPE) / steepest - 1)


# ---- the reference


def tiny_result(device: str, topology: Topology) -> TinyResult:
    """Return what the tiny model computes in fp32 on a device, in this process alone."""
    training = TinyTraining.build(tiny_run("fp32", device), topology)
    weights = _arrays(dict(training.parameters))
    loss, gradients = training.loss_and_gradients()
    return TinyResult(loss, weights, _arrays(gradients), tuple(training.steps(STEPS)))


def _arrays(tensors: dict[str, Tensor]) -> Arrays:
    arrays = Arrays()
    for name, tensor in tensors.items():
        # A copy: steps go on with the tensor itself, whose memory numpy would share on a CPU.
        arrays[name] = tensor.detach().float().cpu().numpy().copy()
    return arrays


def reference_on_cpu() -> TinyResult:
    """Return the same from a process of its own: this one's torch.cuda is a GPU's, or it is one of several ranks."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=quiet_libraries) as child:
        return child.submit(_in_child).result()


def _in_child() -> TinyResult:
    # It is no rank of the world that its parent belongs to.
    for name in ALONE:
        os.environ.pop(name, None)
    config = tiny_run("fp32", "cpu")
    topology = topologies.start(config.parallel, torch.device("cpu"), config.run.seed)
    return tiny_result("cpu", topology)
