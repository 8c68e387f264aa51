"""Build a phase in order: stream, model with its weights, trainer. Here and in run.py the configuration is whole."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from visionloom.common.errors import UserError
from visionloom.data.plan.cursor import Origin, check_state
from visionloom.data.stream.prompt_stream import PromptStream
from visionloom.data.stream.train_stream import PackStream
from visionloom.model.config import ModelConfig
from visionloom.model.distillation_config import DistillationConfig
from visionloom.model.kernels.flash import choose as choose_attention
from visionloom.model.lora import apply_lora
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import draw_weights
from visionloom.model.trainable import set_trainable
from visionloom.parallel import topology as topologies
from visionloom.parallel.topology import Topology
from visionloom.train.changes import settings_of
from visionloom.train.checkpoint import read as checkpoint
from visionloom.train.checkpoint.read import Checkpoint
from visionloom.train.checkpoint.state_file import Inputs
from visionloom.train.compatibility import check_same_model
from visionloom.train.config import RunConfig
from visionloom.train.distillation.options import model_of_teacher
from visionloom.train.distillation.own_layout import OwnLayoutTeacher
from visionloom.train.distillation.teacher import LiveTeacher, StoredTeacher, Teacher
from visionloom.train.engines.engine import Engine
from visionloom.train.engines.megatron import MegatronEngine
from visionloom.train.generation.generator import Generator
from visionloom.train.optim.bad_steps import StepJudge
from visionloom.train.optim.config import OptimConfig
from visionloom.train.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from visionloom.train.phase.config import PhaseConfig
from visionloom.train.phase.trainer import PhaseTrainer
from visionloom.train.reinforcement.learner import PolicyLearner
from visionloom.train.reinforcement.rollouts import Rollouts
from visionloom.train.reinforcement.store import RolloutStore
from visionloom.train.reinforcement.writer import RolloutWriter
from visionloom.train.stream_options import stream_options
from visionloom.train.weights.load_adapter import load_adapter
from visionloom.train.weights.load_huggingface import (
    load_huggingface,
    load_language,
    load_tower,
)


def run_folder(config: RunConfig) -> Path:
    """Return where a run lives: run.folder, or runs/<run.name>."""
    return Path(config.run.folder or f"runs/{config.run.name}")


def open_topology(config: RunConfig) -> Topology:
    """Open the device, threads and process groups of this rank."""
    device = topologies.choose_device(config.run.device)
    topologies.set_threads(config.run.threads)
    if config.run.deterministic:
        topologies.be_deterministic()
    choose_attention(config.model.attention, device)
    run = config.run
    return topologies.start(config.parallel, device, run.seed, run.timeout_minutes)


def phase_topology(config: RunConfig, name: str, topology: Topology) -> Topology:
    """Change to the phase's layout on the same ranks; nothing built on the one before may be used after."""
    layout = config.phases[name].parallel or config.parallel
    return topologies.change(topology, layout, config.run.seed)


# ---- stream


def build_stream(
    config: RunConfig,
    name: str,
    folder: Path,
    topology: Topology,
    before: Mapping[str, Any] | None = None,
) -> PackStream:
    """Plan a phase's packs, a pure function of seed and step.

    Args:
        config: of the run.
        name: of the phase.
        folder: the run's, where unreadable samples are listed once.
        topology: of the phase.
        before: the data state at the end of the phase before, which data.continue_draws continues from.
    """
    origin = None
    if before:
        before = check_state(before)
        origin = Origin.after(before, 0) if config.data.continue_draws else None
    # Of the ranks that share a pack's pictures each meets faults of its own; a sample is written once all the same.
    quarantine = folder / "quarantine.jsonl" if topology.encoder_rank is not None else None
    options, phase = stream_options(config, name), config.phases[name]
    if phase.rl is None:
        return PackStream(options, quarantine, origin)
    stream = PromptStream(options, quarantine, origin)
    stream.updates = phase.rl.updates
    # What interleaved stages need.
    layout = topology.config
    stream.micro_batches_multiple = layout.pipeline if layout.chunks > 1 else 1
    return stream


# ---- model


def model_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the arithmetic of the model for `run.precision`."""
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def build_model(config: RunConfig, topology: Topology, drawn: bool) -> list[Qwen3VL]:
    """Build the model's parts on this rank's device.

    Args:
        config: of the run.
        topology: of the model.
        drawn: draw random weights from run.seed; else they are undefined, to be loaded into.
    """
    parts = empty_parts(config.model, config.run.precision, topology)
    if drawn:
        for part in parts:
            draw_weights(part, config.model, config.run.seed, topology)
    return parts


def as_the_engine_wants(
    config: RunConfig, name: str, topology: Topology
) -> AbstractContextManager[None]:
    """Have a model that is built inside to train in a phase divided from the start, where the engine divides its weights."""
    if topology.config.engine != "deepspeed":
        return nullcontext()
    from visionloom.train.engines.zero import divided_when_made

    dtype = model_dtype(config.run.precision, topology.device)
    return divided_when_made(topology, config.phase_optim(name), dtype)


def empty_parts(model: ModelConfig, precision: str, topology: Topology) -> list[Qwen3VL]:
    """Build the parts of a model, whose weights are undefined; `precision` as run.precision."""
    dtype = model_dtype(precision, topology.device)
    numbers = topology.config.chunk_numbers
    # Made where they stay: a host need not hold them first.
    with topology.device:
        return [Qwen3VL(model, topology, dtype, number) for number in numbers]


def load_whole(
    model: ModelConfig, precision: str, folder: Path, option: str, topology: Topology
) -> list[Qwen3VL]:
    """Build a model with the weights of a checkpoint, which the option names; raises UserError as `whole_weights`."""
    parts = empty_parts(model, precision, topology)
    checkpoint.load_weights(whole_weights(folder, model, topology, option), parts, topology)
    return parts


def build_teacher(config: RunConfig, name: str, topology: Topology) -> Teacher | None:
    """Build the teacher of a phase; None where it has none.

    Raises:
        UserError: if its weights are damaged, of another model, or adapters only.
    """
    options = config.phases[name].distillation
    if options is None:
        return None
    if not options.is_live:
        return StoredTeacher(options, topology.device)
    layout = options.teacher.parallel
    if layout is None or layout == topology.config:
        return LiveTeacher(options, teacher_parts(config, name, options, topology), topology)
    # All of the teacher is made in its own layout: Megatron-core's modules look up a few things when they are built.
    own = topologies.open_beside(topology, layout)
    with own.entered():
        parts = teacher_parts(config, name, options, own)
    return OwnLayoutTeacher(options, parts, own, topology)


def teacher_parts(
    config: RunConfig, name: str, options: DistillationConfig, topology: Topology
) -> list[Qwen3VL]:
    """Build a live teacher with its weights, in the layout of `topology`; raises UserError as `build_teacher`."""
    model, option = model_of_teacher(options, f"phases.{name}.distillation")
    precision = config.run.precision
    if not options.teacher.huggingface:
        return load_whole(model, precision, Path(options.teacher.checkpoint), option, topology)
    parts = empty_parts(model, precision, topology)
    load_huggingface(Path(options.teacher.huggingface), parts, model, topology)
    return parts


def build_rollouts(
    config: RunConfig, trainer: PhaseTrainer, start: Callable[[], list[Qwen3VL]]
) -> None:
    """Let a phase with rewards train on answers of its own; `start` builds the model with the weights that the phase began with.

    Raises:
        UserError: if a reward cannot be used.
    """
    options, topology, stream = trainer.phase.rl, trainer.topology, trainer.stream
    if options is None or not isinstance(stream, PromptStream):
        return
    settings = {
        **trainer.settings,
        "run.seed": config.run.seed,
        "tokenizer": stream.tokenizer.fingerprint,
        "plan": stream.plan.hash,
    }
    writer = RolloutWriter(
        options,
        trainer.phase_name,
        stream,
        RolloutStore(run_folder(config), trainer.phase_name, settings),
        Generator(trainer.model_parts, topology, stream.tokenizer.pad_id, options.rollout.budget),
        config.run.seed,
    )
    trainer.rollouts = Rollouts(options, stream, writer)
    teacher = trainer.teacher
    # A teacher's whole distributions are learned by its own loss.
    if teacher is None or options.teacher_reward:
        reference = start() if options.policy.kl else []
        judges = teacher.parts if isinstance(teacher, LiveTeacher) else []
        trainer.teacher = PolicyLearner(
            options, trainer.model_parts, trainer.engine, topology, reference, judges
        )


def first_weights(config: RunConfig, topology: Topology) -> list[Qwen3VL]:
    """Build a model with the weights that the run begins with, and adapters if it trains some.

    Weights are those of init.huggingface or init.checkpoint, of a tower and a language model in folders of their own, or random
    ones; adapters are those of lora.adapter, or new ones.

    Raises:
        UserError: if init.checkpoint is damaged, of another model, or holds adapters only.
    """
    init, lora = config.init, config.lora
    parts = build_model(config, topology, drawn=not (init.huggingface or init.checkpoint))
    if init.huggingface:
        load_huggingface(Path(init.huggingface), parts, config.model, topology)
    if init.vision:
        load_tower(Path(init.vision), parts, config.model, topology)
    if init.language:
        load_language(Path(init.language), parts, config.model, topology)
    if init.checkpoint:
        first = whole_weights(Path(init.checkpoint), config.model, topology)
        checkpoint.load_weights(first, parts, topology)
    # After the weights, which have the names of a model without adapters.
    if lora.rank:
        apply_lora(parts, lora, topology, config.run.seed)
    if lora.rank and lora.adapter:
        load_adapter(Path(lora.adapter), parts, topology)
    return parts


def whole_weights(
    folder: Path, model: ModelConfig, topology: Topology, option: str = "init.checkpoint"
) -> Checkpoint:
    """Return the checkpoint that an option names.

    Raises:
        UserError: if it is damaged, of another model, or holds adapters only.
    """
    first = checkpoint.whole(folder, option, topology)
    check_same_model(first, model)
    if first.run_state.lora:
        raise UserError(
            f"{option}={first.folder} holds adapters only: name the checkpoint that they were trained on,"
            " and export them for lora.adapter"
        )
    return first


def model_to_load(config: RunConfig, topology: Topology) -> list[Qwen3VL]:
    """Build a model for a checkpoint of the run to be loaded into.

    A checkpoint of adapters has nothing else: the weights under them are the run's first.
    """
    if config.lora.rank:
        return first_weights(config, topology)
    return build_model(config, topology, drawn=False)


def newest_weights(
    config: RunConfig, topology: Topology, newest: Checkpoint | None
) -> list[Qwen3VL]:
    """Build a model with the weights of the run's newest checkpoint, or with its first ones."""
    if newest is None:
        return first_weights(config, topology)
    parts = model_to_load(config, topology)
    checkpoint.load_weights(newest, parts, topology)
    return parts


def draw_fresh_groups(
    parts: list[Qwen3VL], config: RunConfig, name: str, topology: Topology
) -> None:
    """Draw the phase's `fresh` groups anew, with a seed of the phase's own."""
    groups = set(config.phases[name].fresh)
    if not groups:
        return
    # run.seed itself has drawn the first weights.
    seed = config.run.seed + 1 + list(config.phases).index(name)
    for part in parts:
        draw_weights(part, config.model, seed, topology, groups)


# ---- trainer


def build_trainer(
    config: RunConfig, name: str, topology: Topology, parts: list[Qwen3VL], stream: PackStream
) -> PhaseTrainer:
    """Freeze, wrap and give the model an optimizer for one phase."""
    # Before the wrapping: DDP has buffers of gradients only for parameters that need them.
    phase = config.phases[name]
    for part in parts:
        if part.lora is None:
            set_trainable(part, phase.trainable)
        else:
            set_trainable(part, phase.trainable, part.lora.trains)
    optim = config.phase_optim(name)
    engine = build_engine(parts, topology, optim, phase)
    weights = config.init.huggingface or config.init.checkpoint
    return PhaseTrainer(
        phase_name=name,
        phase=phase,
        topology=topology,
        model_parts=parts,
        engine=engine,
        scheduler=build_scheduler(engine.optimizer, optim, phase),
        stream=stream,
        judge=StepJudge(optim),
        inputs=Inputs.of(config.phase_data(name), stream.tokenizer.fingerprint, weights),
        settings=settings_of(config, name),
    )


def build_engine(
    parts: list[Qwen3VL], topology: Topology, optim: OptimConfig, phase: PhaseConfig
) -> Engine:
    """Wrap a model whose frozen parameters are marked, and give it an optimizer, as `parallel.engine` says."""
    bf16 = next(parts[0].parameters()).dtype == torch.bfloat16
    if topology.config.engine == "deepspeed":
        # Imported here: DeepSpeed is an extra.
        from visionloom.train.engines.zero import ZeroEngine

        return ZeroEngine(parts, topology, optim, phase)
    wrapped = wrap_data_parallel(parts, topology)
    optimizer = build_optimizer(wrapped, optim, phase, bf16)
    return MegatronEngine(parts, wrapped, optimizer, topology)
