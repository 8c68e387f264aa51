"""The built things of a phase, in order: model, data-parallel wrapper, optimizer, schedule, data stream."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from visionloom.data.plan.cursor import Origin, check_state
from visionloom.data.stream.train_stream import PackStream
from visionloom.model.config import ModelConfig
from visionloom.model.lora import apply_lora
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import draw_weights
from visionloom.model.trainable import set_trainable
from visionloom.parallel.topology import Topology
from visionloom.train.changes import settings_of
from visionloom.train.checkpoint.state_file import Inputs
from visionloom.train.config import PhaseConfig, RunConfig
from visionloom.train.cost import cost_model
from visionloom.train.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from visionloom.train.weights.load_adapter import load_adapter


@dataclass
class Stage:
    """Everything that trains in one phase."""

    name: str
    phase: PhaseConfig
    topology: Topology
    chunks: list[Qwen3VL]
    """The model, or this pipeline stage's chunks of it."""
    wrapped: list[Any]
    """The chunks in Megatron's DDP."""
    optimizer: Any
    scheduler: Any
    stream: PackStream
    inputs: Inputs | None = None
    """What its checkpoints say that they were trained with."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What they remember of the configuration, to name what changes."""

    @property
    def has_dropout(self) -> bool:
        """Whether a step draws random numbers: adapters may, the model itself never does."""
        lora = self.chunks[0].lora
        return lora is not None and lora.dropout > 0

    @property
    def model_config(self) -> ModelConfig:
        """The architecture."""
        return self.chunks[0].model_config


def model_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Arithmetic of the model for `run.precision`."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def build_model(config: RunConfig, topology: Topology, drawn: bool) -> list[Qwen3VL]:
    """The model's chunks on this rank's device: with random weights from run.seed, or not `drawn`, to be loaded into."""
    dtype = model_dtype(config.run.precision, topology.device)
    numbers = range(topology.config.chunks) if topology.config.chunks > 1 else [None]
    chunks = [Qwen3VL(config.model, topology, dtype, number) for number in numbers]
    for chunk in chunks:
        chunk.to(topology.device)
        if drawn:
            draw_weights(chunk, config.model, config.run.seed, topology)
    return chunks


def add_adapters(chunks: list[Qwen3VL], config: RunConfig, topology: Topology) -> None:
    """Give a model that has its weights the adapters of `lora`, new ones or those of lora.adapter."""
    apply_lora(chunks, config.lora, topology, config.run.seed)
    if config.lora.adapter:
        load_adapter(Path(config.lora.adapter), chunks, topology)


def redraw(chunks: list[Qwen3VL], config: RunConfig, phase: str, topology: Topology) -> None:
    """Draw the phase's `fresh` groups anew, with a seed of the phase's own."""
    index = list(config.phases).index(phase)
    groups = set(config.phases[phase].fresh)
    if groups:
        for chunk in chunks:
            draw_weights(chunk, config.model, config.run.seed + 1 + index, topology, groups)


def build_stream(
    config: RunConfig, phase: str, folder: Path, topology: Topology, before: Mapping[str, Any] | None = None
) -> PackStream:
    """The phase's packs as a pure function of seed and step; unreadable samples are listed once in the run's folder.

    `before` is the data state at the end of the phase before, which data.continue_draws goes on from.
    """
    settings = config.phases[phase]
    if before:
        check_state(before)
    return PackStream(
        config.data,
        phase,
        sequence_length=settings.sequence_length,
        global_batch=settings.global_batch,
        mixture=settings.mixture,
        loss=settings.loss,
        seed=config.run.seed,
        cost=cost_model(config.model, set(settings.trainable), config.lora if config.lora.rank else None),
        # each of the ranks that share a pack's pictures sees faults of its own; a sample is written once all the same
        quarantine=folder / "quarantine.jsonl" if topology.encoder_rank is not None else None,
        origin=Origin.after(before, 0) if before and config.data.continue_draws else None,
    )


def build_stage(config: RunConfig, name: str, topology: Topology, chunks: list[Qwen3VL], stream: PackStream) -> Stage:
    """Freeze, wrap and give the model an optimizer for one phase."""
    phase = config.phases[name]
    for chunk in chunks:
        set_trainable(chunk, phase.trainable, adapters_only=chunk.lora is not None)
    wrapped = wrap_data_parallel(chunks, topology)
    bf16 = next(chunks[0].parameters()).dtype == torch.bfloat16
    optimizer = build_optimizer(wrapped, config.optim, phase, bf16)
    scheduler = build_scheduler(optimizer, config.optim, phase)
    inputs = Inputs.of(config.data, stream.tokenizer.fingerprint, config.init.huggingface or config.init.checkpoint)
    return Stage(name, phase, topology, chunks, wrapped, optimizer, scheduler, stream, inputs, settings_of(config, name))
