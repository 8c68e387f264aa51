"""A model's loss and gradients in any layout against one process: what the tests and the table of `make parity` share.

Reference: one process with the same code, which tests/model/test_parity.py proves equal to transformers.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionloom.data.stream.batch import TeacherRows
from visionloom.model.config import ModelConfig
from visionloom.model.distillation_config import DistillationConfig
from visionloom.model.sharding import canonical_parameters, cut, full_shape
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import (
    Example,
    TestPack,
    make_example,
    make_pack,
    reference_model,
    tiny_config,
)

STEPS = 20
LENGTH, MULTIPLE = 128, 8
"""Tokens of a pack, and of what each segment's length is a multiple: enough for four context ranks."""
CONTENTS: dict[str, list[list[list[Any]]]] = {
    # micro-batch, sample, part: text length, image (h, w), video (t, h, w)
    "everything": [
        [[5, (4, 6), 9], [21], [2, (2, 4, 4), 3, (2, 2), 11]],
        [[40], [17]],
        [[3, (2, 2), 4, (6, 4), 1, (2, 10), 12], [4, (3, 4, 4), 8]],
        [[30, (8, 8), 20]],
    ],
    "images": [
        [[5, (4, 6), 9], [3, (2, 2), 4]],
        [[6, (6, 6), 30]],
        [[9, (2, 4), 3, (4, 4), 7]],
        [[2, (2, 2), 5]],
    ],
    "text": [[[40], [17]], [[90]], [[11], [12], [13]], [[64]]],
}


@dataclass(frozen=True)
class Case:
    """What is computed, whatever the layout."""

    experts: int = 0
    tied: bool = True
    content: str = "everything"
    trainable: tuple[str, ...] = ("vision", "merger", "language")
    balance: float = 0.01
    """Weight of the load-balancing loss of a mixture."""
    lora: bool = False
    """Whether adapters, with both factors drawn, train alone."""
    optimizer: str = "adamw"
    moments: str = "fp32"
    teacher: str = ""
    """`live`: a wider model beside the student; `stored`: tokens drawn for each pack; empty: none."""

    @property
    def model(self) -> ModelConfig:
        """The tiny model, dense or a mixture."""
        config = tiny_config(self.tied, self.experts)
        return replace(config, text=replace(config.text, balance_coefficient=self.balance))


@dataclass(frozen=True)
class Layout:
    """A layout on a number of ranks, and which case it computes."""

    ranks: int
    parallel: dict[str, Any]
    case: Case = field(default_factory=Case)
    one_encoder: bool = False
    """All pictures on the first encoder rank, so that the others have none."""
    mistake: str = ""
    """One of MISTAKES, to show that the comparison finds it."""
    teacher: dict[str, Any] | None = None
    """A layout of the live teacher's own; None: the student's."""

    @property
    def config(self) -> ParallelConfig:
        """The configuration of the axes."""
        return ParallelConfig(**self.parallel)


def packs_of(content: str) -> list[TestPack]:
    """The micro-batches of the global batch, with positions from transformers and rows of a stored teacher."""
    theirs = reference_model(tiny_config(), 0)
    packs = [
        make_pack(theirs, examples_of(samples), LENGTH, MULTIPLE) for samples in CONTENTS[content]
    ]
    return with_teacher(packs)


def packs_of_each(samples: list[list[Any]]) -> list[TestPack]:
    """The samples of a micro-batch, each in a pack of its own."""
    theirs = reference_model(tiny_config(), 0)
    return [make_pack(theirs, [example], LENGTH) for example in examples_of(samples)]


def examples_of(samples: list[list[Any]]) -> list[Example]:
    """Random samples, the same for the same parts."""
    return [make_example(parts, zlib.crc32(repr(parts).encode())) for parts in samples]


def with_teacher(packs: list[TestPack]) -> list[TestPack]:
    """The packs with four tokens at each supervised one, of random masses that leave some for all others."""
    made = []
    for number, pack in enumerate(packs):
        generator = torch.Generator().manual_seed(number)
        tokens = (pack.loss_weights > 0).nonzero()[:, 0]
        logits = torch.randn(len(tokens), 96, generator=generator) * 3
        log_probabilities, ids = logits.log_softmax(1).topk(4)
        rest = logits.log_softmax(1).scatter(1, ids, -torch.inf).logsumexp(1)
        rows = TeacherRows(tokens, ids.int(), log_probabilities.half(), rest)
        made.append(replace(pack, teacher=rows))
    return made


def teacher_of(layout: Layout, topology: Topology) -> Any:
    """The teacher of a case; None: it has none."""
    from visionloom.train.distillation.own_layout import OwnLayoutTeacher
    from visionloom.train.distillation.teacher import LiveTeacher, StoredTeacher

    case = layout.case
    options = DistillationConfig(temperature=2.0, weight=2.0, cross_entropy_weight=0.5)
    if case.teacher == "stored":
        options.direction = "reverse"
        return StoredTeacher(options, topology.device)
    if not case.teacher:
        return None
    if layout.teacher is None:
        return LiveTeacher(options, teacher_parts(case, topology), topology)
    own = topologies.open_beside(topology, ParallelConfig(**layout.teacher))
    with own.entered():
        parts = teacher_parts(case, own)
    return OwnLayoutTeacher(options, parts, own, topology)


def teacher_parts(case: Case, topology: Topology) -> list[Any]:
    """The parts of a live teacher, which is wider than its student."""
    from visionloom.model.qwen3vl import Qwen3VL

    text = replace(case.model.text, hidden_size=96)
    model, numbers = replace(case.model, text=text), topology.config.chunk_numbers
    parts = [Qwen3VL(model, topology, torch.float32, number) for number in numbers]
    for part in parts:
        weigh(part, topology, "teacher ")
    return parts


def weigh(chunk: Any, topology: Topology, whose: str = "") -> None:
    """Weights large enough that every part of the model matters, drawn by canonical name."""
    with torch.no_grad():
        for name, parameter in canonical_parameters(chunk):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{whose}{name}".encode()))
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            full = (
                centre
                + torch.randn(full_shape(name, parameter, topology), generator=generator) * 0.1
            )
            parameter.copy_(cut(name, full, parameter, topology))


def deal(packs: list[TestPack], topology: Topology, one_encoder: bool) -> list[TestPack]:
    """This data-parallel rank's micro-batches, their pictures dealt in turn to the encoder ranks."""
    size = topology.config.encoder_ranks
    mine = packs[topology.data_rank :: topology.data_size]
    owners = [
        torch.arange(len(p.grid_thw), dtype=torch.int32) % (1 if one_encoder else size)
        for p in mine
    ]
    return [p.dealt(topology.encoder_rank, owner) for p, owner in zip(mine, owners, strict=True)]


def read(stage: Any, packs: list[TestPack], layout: Layout) -> list[Any]:
    """This rank's micro-batches, and after them those of a teacher with a layout of its own."""
    mine = deal(packs, stage.topology, layout.one_encoder)
    if layout.teacher is None:
        return mine
    return mine + deal(packs, stage.teacher.topology, layout.one_encoder)


def features_not_reduced(chunks: list[Any], packs: list[TestPack]) -> list[TestPack]:
    """The gradients of the features that a tensor rank has used stay on that rank."""
    for chunk in chunks:
        for parameter in chunk.visual.parameters():
            parameter.sequence_parallel = False
    return packs


def experts_reduced_over_all(chunks: list[Any], packs: list[TestPack]) -> list[TestPack]:
    """Experts are reduced over all data-parallel ranks, as dense parameters are, and not over those that hold the same ones."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                parameter.allreduce = True
    return packs


def adapters_not_reduced(chunks: list[Any], packs: list[TestPack]) -> list[TestPack]:
    """The factors that see a share of the tokens keep their gradients for themselves."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".adapter." in name:
                parameter.sequence_parallel = False
    return packs


def positions_after_packing(chunks: list[Any], packs: list[TestPack]) -> list[TestPack]:
    """Positions count up over the whole pack, pictures included."""
    return [replace(pack, position_ids=torch.arange(LENGTH).expand(3, -1).int()) for pack in packs]


def divided_per_micro_batch(chunks: list[Any], packs: list[TestPack]) -> list[TestPack]:
    """The mean over micro-batches of their mean losses."""
    total = float(sum(pack.loss_weights.sum() for pack in packs))
    return [
        replace(p, loss_weights=p.loss_weights / p.loss_weights.sum() * total / len(packs))
        for p in packs
    ]


MISTAKES: dict[str, Callable[[list[Any], list[TestPack]], list[TestPack]]] = {
    mistake.__name__: mistake
    for mistake in (
        features_not_reduced,
        experts_reduced_over_all,
        adapters_not_reduced,
        positions_after_packing,
        divided_per_micro_batch,
    )
}


def build(
    layout: Layout,
    sharded: bool,
    topology: Topology | None = None,
    dtype: torch.dtype = torch.float32,
    clip: float = 1.0,
) -> Any:
    """A trainer of the case in the layout, wrapped for data parallelism; an optimizer too if `sharded`.

    `topology` is that of an imagined rank, None: this process is a real one.
    """
    from visionloom.model import kept
    from visionloom.model.lora import apply_lora
    from visionloom.model.lora_config import LoraConfig
    from visionloom.model.qwen3vl import Qwen3VL
    from visionloom.model.trainable import set_trainable
    from visionloom.train.build import build_engine
    from visionloom.train.engines.megatron import MegatronEngine
    from visionloom.train.optim.config import OptimConfig
    from visionloom.train.optimizer import build_scheduler, wrap_data_parallel
    from visionloom.train.phase.config import PhaseConfig
    from visionloom.train.phase.trainer import PhaseTrainer

    kept.LEAST_BYTES = 0  # a tiny model's activations are all small
    topology = topology or topologies.start(layout.config, torch.device("cpu"))
    numbers = layout.config.chunk_numbers
    with topology.device:
        chunks = [Qwen3VL(layout.case.model, topology, dtype, number) for number in numbers]
    if layout.case.lora:
        lora = LoraConfig(rank=8, alpha=16.0, groups=list(layout.case.trainable))
        apply_lora(chunks, lora, topology, 0)
    for chunk in chunks:
        weigh(chunk, topology)
        may_train = chunk.lora.trains if chunk.lora else lambda name: True
        set_trainable(chunk, layout.case.trainable, may_train)
    if layout.mistake:
        MISTAKES[layout.mistake](chunks, [])
    phase = PhaseConfig(steps=STEPS, lr=1e-3, trainable=list(layout.case.trainable))
    optim = OptimConfig(clip_grad=clip)
    optim.name, optim.moments = layout.case.optimizer, layout.case.moments
    if sharded:
        engine = build_engine(chunks, topology, optim, phase)
    else:
        engine = MegatronEngine(chunks, wrap_data_parallel(chunks, topology, False), None, topology)
    scheduler = build_scheduler(engine.optimizer, optim, phase) if sharded else None
    stream: Any = type(
        "Stream", (), {"datasets": [type("Dataset", (), {"name": "test"})], "step_of_plan": int}
    )
    teacher = teacher_of(layout, topology)
    return PhaseTrainer("test", phase, topology, chunks, engine, scheduler, stream, teacher)


def backward(layout: Layout, packs: list[TestPack]) -> tuple[Any, float]:
    """A trainer with its gradients, and the loss. Two passes, so that routers know the loads of the first."""
    from visionloom.train.step import compute_gradients, open_sums

    stage = build(layout, sharded=False)
    if layout.mistake:
        packs = MISTAKES[layout.mistake](stage.model_parts, packs)
    for _ in range(2):
        mine = read(stage, packs, layout)
        if stage.teacher is not None:
            mine = stage.teacher.take(mine)
        sums = open_sums(stage, mine)
        compute_gradients(stage, mine, sums)
    totals = sums.totals()
    return stage, totals.loss + totals.measured[0]


def trainable(stage: Any) -> dict[str, Any]:
    """This rank's trainable parameters by canonical name; a tied matrix on two stages counts on the first."""
    named = [pair for chunk in reversed(stage.model_parts) for pair in canonical_parameters(chunk)]
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def reference(layout: Layout, packs: list[TestPack], file: Path) -> float:
    """Save one process's gradients; returns its loss. Runs on a rank of the pool."""
    stage, loss = backward(replace(layout, parallel={}, ranks=1, teacher=None), packs)
    torch.save({name: parameter.main_grad for name, parameter in trainable(stage).items()}, file)
    return loss


Errors = dict[str, tuple[float, float]]
"""Squared norms of the error and of the reference, by parameter."""


def compare(layout: Layout, packs: list[TestPack], file: Path) -> tuple[float, Errors]:
    """This rank's loss and the errors of its parts of the gradients. Runs on every rank of the pool."""
    stage, loss = backward(layout, packs)
    expected: dict[str, Tensor] = torch.load(file)
    errors = {}
    for name, parameter in trainable(stage).items():
        part = cut(name, expected[name], parameter, stage.topology)
        difference = parameter.main_grad - part
        errors[name] = float(difference.double().pow(2).sum()), float(part.double().pow(2).sum())
    return loss, errors


def worst(found: list[Errors]) -> tuple[float, str]:
    """Largest relative error of a parameter over all ranks' parts of it, and its name."""
    relative = {}
    for name in {name for errors in found for name in errors}:
        parts = [errors[name] for errors in found if name in errors]
        error, size = (sum(part[i] for part in parts) ** 0.5 for i in range(2))
        relative[name] = error / size if size else error
    name = max(relative, key=relative.__getitem__)
    return relative[name], name


def curve(layout: Layout, packs: list[TestPack]) -> list[float]:
    """Losses of STEPS optimizer steps with the distributed optimizer. Runs on every rank of the pool."""
    from visionloom.train.step import train_step

    stage = build(layout, sharded=True)
    mine = read(stage, packs, layout)
    return [train_step(stage, mine).loss for _ in range(STEPS)]
