"""Every kind of parallelism trains the same model: loss, gradients and 20 optimizer steps against one process.

A mixture's curves are held to 20 steps on these packs: on other data a token may be routed otherwise from step 14 on, since two of
its scores differ by less than rounding does between layouts, and curves part there (benchmarks/routing.py).
`make proofs` runs all layouts and prints them as a table, `make parity` those without teachers and adapters; `make test` runs a few.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.model.reference import TestPack
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import (
    CONTENTS,
    Case,
    Layout,
    backward,
    build,
    compare,
    curve,
    deal,
    packs_of,
    packs_of_each,
    reference,
    trainable,
    worst,
)
from visionloom.train.step import agree_on_unreadable, train_step

GRADIENTS, CURVES = 1e-5, 1e-4
MIXTURE = Case(experts=8)
ADAPTERS, EXPERT_ADAPTERS = Case(lora=True), Case(experts=8, lora=True)
LANGUAGE_ADAPTERS = Case(lora=True, trainable=("language",))
LIVE, STORED = Case(teacher="live"), Case(teacher="stored")
LIVE_MIXTURE = Case(experts=8, teacher="live")
QUICK = ("tensor 2", "context 2", "tensor 2 x expert 2", "live teacher on context 2, pipeline 2")


def dense(ranks: int, **parallel: object) -> Layout:
    return Layout(ranks, parallel)


def mixture(ranks: int, **parallel: object) -> Layout:
    return Layout(ranks, parallel, MIXTURE)


def taught(student: Layout, **parallel: object) -> Layout:
    """The layout of a student whose live teacher has another one."""
    return replace(student, case=LIVE, teacher=parallel)


LAYOUTS: dict[str, Layout] = {
    "data 2": dense(2),
    "tensor 2": dense(2, tensor=2),
    "tensor 2, no sequence parallelism": dense(2, tensor=2, sequence=False),
    "tensor 2, recompute full": dense(2, tensor=2, recompute="full"),
    "tensor 2, recompute norms": dense(2, tensor=2, recompute="norms_and_activations"),
    "tensor 2, recompute mlp": dense(2, tensor=2, recompute="mlp"),
    "recompute block": dense(1, recompute="block", recompute_layers=1),
    "tensor 2, untied": replace(dense(2, tensor=2), case=Case(tied=False)),
    "tensor 2 x data 2": dense(4, tensor=2),
    "activations in host memory": dense(2, tensor=2, offload_activations=True),
    "pipeline 2": dense(2, pipeline=2),
    "pipeline 2, untied": replace(dense(2, pipeline=2), case=Case(tied=False)),
    "pipeline 2, levels travel": dense(2, pipeline=2, pipeline_layout="Et|tttL"),
    "pipeline 2, vision alone on the first": dense(
        2, pipeline=2, pipeline_layout="E|ttttL", recompute="full"
    ),
    "pipeline 2, virtual 2, levels travel": dense(2, pipeline=2, virtual_pipeline=2),
    "pipeline 4, levels travel": dense(4, pipeline=4, recompute="all_but_attention"),
    "pipeline 3, levels travel": dense(3, pipeline=3, pipeline_layout="Et|t|ttL"),
    "pipeline 2 x data 2": dense(4, pipeline=2, pipeline_layout="Et|tttL"),
    "context 2": dense(2, context=2),
    "context 2, ulysses": dense(2, context=2, context_exchange="ulysses"),
    "context 2, recompute full": dense(2, context=2, recompute="full"),
    "context 4": dense(4, context=4),
    "context 2, one rank has all pictures": replace(dense(2, context=2), one_encoder=True),
    "tensor 2 x context 2": dense(4, tensor=2, context=2),
    "tensor 2 x context 2, one rank has all pictures": replace(
        dense(4, tensor=2, context=2), one_encoder=True
    ),
    "tensor 2 x context 2, no sequence parallelism": dense(4, tensor=2, context=2, sequence=False),
    "tensor 2 x pipeline 2": dense(4, tensor=2, pipeline=2, pipeline_layout="Et|tttL"),
    "context 2 x pipeline 2": dense(4, context=2, pipeline=2, pipeline_layout="Et|tttL"),
    "text only, tensor 2 x context 2": replace(
        dense(4, tensor=2, context=2), case=Case(content="text")
    ),
    "text only, pipeline 2": replace(
        dense(2, pipeline=2, pipeline_layout="Et|tttL"), case=Case(content="text")
    ),
    "pictures, tensor 2 x pipeline 2": replace(
        dense(4, tensor=2, pipeline=2), case=Case(content="images")
    ),
    "mergers only, pipeline 2": replace(dense(2, pipeline=2), case=Case(trainable=("merger",))),
    "mergers only, tensor 2 x pipeline 2": replace(
        dense(4, tensor=2, pipeline=2, pipeline_layout="Et|tttL", recompute="full"),
        case=Case(trainable=("merger",)),
    ),
    "language only, tensor 2 x context 2": replace(
        dense(4, tensor=2, context=2), case=Case(trainable=("language",))
    ),
    "mixture, data 2": mixture(2),
    "mixture, tensor 2": mixture(2, tensor=2),
    "mixture, expert 2": mixture(2, expert=2),
    "mixture, expert 2, recompute full": mixture(2, expert=2, recompute="full"),
    "mixture, expert 2, recompute mlp": mixture(2, expert=2, recompute="mlp"),
    "mixture, expert 2, recompute one layer, all but attention": mixture(
        2, expert=2, recompute="all_but_attention", recompute_layers=1
    ),
    "mixture, expert 2, activations in host memory": mixture(
        2, expert=2, recompute="norms_and_activations", offload_activations=True
    ),
    "mixture, expert 2 in two parts": mixture(2, expert=2, expert_parts=2),
    "mixture, expert 4": mixture(4, expert=4),
    "tensor 2 x expert 2": mixture(2, tensor=2, expert=2),
    "mixture, tensor 2 x expert tensor 2": mixture(2, tensor=2, expert_tensor=2),
    "mixture, tensor 2 x expert 2 x expert tensor 2": mixture(
        4, tensor=2, expert=2, expert_tensor=2
    ),
    "tensor 2 x expert 2 x expert tensor 2 in three parts": mixture(
        4, tensor=2, expert=2, expert_tensor=2, expert_parts=3, recompute="full"
    ),
    "context 2 x expert 2": mixture(2, context=2, expert=2),
    "pipeline 2 x expert 2": mixture(
        4, pipeline=2, expert=2, pipeline_layout="Et|tttL", recompute="full"
    ),
    "tensor 2 x context 2 x expert 4": mixture(4, tensor=2, context=2, expert=4),
    "mixture, pipeline 2, virtual 2": mixture(
        2, pipeline=2, virtual_pipeline=2, recompute="all_but_attention"
    ),
    "mixture, pipeline 2, virtual 2, vision alone": mixture(
        2,
        pipeline=2,
        virtual_pipeline=2,
        pipeline_layout="E|tt|t|tL",
        recompute="all_but_attention",
        recompute_layers=1,
    ),
    "mixture, text only, expert 2": replace(
        mixture(2, expert=2), case=Case(experts=8, content="text")
    ),
    "adapters, data 2": replace(dense(2), case=ADAPTERS),
    "adapters, tensor 2": replace(dense(2, tensor=2), case=ADAPTERS),
    "adapters, tensor 2, no sequence parallelism": replace(
        dense(2, tensor=2, sequence=False), case=ADAPTERS
    ),
    "adapters, pipeline 2, recompute full": replace(
        dense(2, pipeline=2, recompute="full"), case=LANGUAGE_ADAPTERS
    ),
    "adapters, pipeline 2, virtual 2, levels travel": replace(
        dense(2, pipeline=2, virtual_pipeline=2), case=ADAPTERS
    ),
    "adapters, pipeline 2, vision alone on the first": replace(
        dense(2, pipeline=2, pipeline_layout="E|ttttL"), case=LANGUAGE_ADAPTERS
    ),
    "adapters, context 2": replace(dense(2, context=2), case=ADAPTERS),
    "adapters, language only, recompute full": replace(
        dense(1, recompute="full"), case=LANGUAGE_ADAPTERS
    ),
    "adapters, tensor 2 x context 2": replace(dense(4, tensor=2, context=2), case=ADAPTERS),
    "adapters, tensor 2 x pipeline 2": replace(dense(4, tensor=2, pipeline=2), case=ADAPTERS),
    "adapters, expert 2": replace(mixture(2, expert=2), case=EXPERT_ADAPTERS),
    "adapters, tensor 2 x expert 2": replace(mixture(2, tensor=2, expert=2), case=EXPERT_ADAPTERS),
    "adapters, tensor 2 x expert tensor 2": replace(
        mixture(2, tensor=2, expert_tensor=2), case=EXPERT_ADAPTERS
    ),
    "adapters, expert tensor 2": replace(mixture(2, expert_tensor=2), case=EXPERT_ADAPTERS),
    "adapters, tensor 2 x expert 2 x expert tensor 2": replace(
        mixture(4, tensor=2, expert=2, expert_tensor=2), case=EXPERT_ADAPTERS
    ),
    "live teacher, data 2": replace(dense(2), case=LIVE),
    "live teacher, tensor 2": replace(dense(2, tensor=2), case=LIVE),
    "live teacher, tensor 2, recompute full": replace(
        dense(2, tensor=2, recompute="full"), case=LIVE
    ),
    "live teacher, context 2": replace(dense(2, context=2), case=LIVE),
    "live teacher, pipeline 2, levels travel": replace(
        dense(2, pipeline=2, pipeline_layout="Et|tttL"), case=LIVE
    ),
    "live teacher, pipeline 2, virtual 2": replace(
        dense(2, pipeline=2, virtual_pipeline=2), case=LIVE
    ),
    "live teacher, tensor 2 x context 2": replace(dense(4, tensor=2, context=2), case=LIVE),
    "live teacher, tensor 2 x pipeline 2": replace(dense(4, tensor=2, pipeline=2), case=LIVE),
    "live teacher, tensor 2 x expert 2": replace(mixture(2, tensor=2, expert=2), case=LIVE_MIXTURE),
    "live teacher, language only, pipeline 2 x data 2": replace(
        dense(4, pipeline=2), case=replace(LIVE, trainable=("language",))
    ),
    "live teacher, adapters, tensor 2": replace(dense(2, tensor=2), case=replace(LIVE, lora=True)),
    "live teacher on tensor 2, data 2": taught(dense(2), tensor=2),
    "live teacher on data 2, tensor 2": taught(dense(2, tensor=2)),
    "live teacher on context 2, pipeline 2": taught(dense(2, pipeline=2), context=2),
    "live teacher on pipeline 2 with virtual 2, context 2": taught(
        dense(2, context=2), pipeline=2, virtual_pipeline=2
    ),
    "live teacher on pipeline 2, adapters, data 2": replace(
        taught(dense(2), pipeline=2), case=replace(LIVE, lora=True)
    ),
    "live teacher on expert 2, tensor 2": replace(
        taught(mixture(2, tensor=2), expert=2), case=LIVE_MIXTURE
    ),
    "live teacher on pipeline 2, expert 2": replace(
        taught(mixture(2, expert=2), pipeline=2), case=LIVE_MIXTURE
    ),
    "live teacher on tensor 2 x context 2, data 4": taught(dense(4), tensor=2, context=2),
    "live teacher on data 4, tensor 2 x pipeline 2": taught(dense(4, tensor=2, pipeline=2)),
    "live teacher on pipeline 4, tensor 2 x context 2": taught(
        dense(4, tensor=2, context=2), pipeline=4
    ),
    "live teacher on context 4, pipeline 2 x data 2": taught(dense(4, pipeline=2), context=4),
    "live teacher on tensor 2 x pipeline 2, context 2 x data 2": taught(
        dense(4, context=2), tensor=2, pipeline=2
    ),
    "live teacher on context 2 x expert 4, tensor 2 x expert 2": replace(
        taught(mixture(4, tensor=2, expert=2), context=2, expert=4), case=LIVE_MIXTURE
    ),
    "stored teacher, data 2": replace(dense(2), case=STORED),
    "stored teacher, tensor 2": replace(dense(2, tensor=2), case=STORED),
    "stored teacher, context 2": replace(dense(2, context=2), case=STORED),
    "stored teacher, pipeline 2, virtual 2": replace(
        dense(2, pipeline=2, virtual_pipeline=2), case=STORED
    ),
    "stored teacher, tensor 2 x context 2": replace(dense(4, tensor=2, context=2), case=STORED),
    "stored teacher, context 2 x pipeline 2": replace(dense(4, context=2, pipeline=2), case=STORED),
}


class References:
    """One process's losses, gradients and curves, each computed once."""

    def __init__(self, pool: RankPool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self.packs: dict[str, list[TestPack]] = {}
        self.losses: dict[Case, float] = {}
        self.curves: dict[Case, list[float]] = {}

    def packs_for(self, case: Case) -> list[TestPack]:
        if case.content not in self.packs:
            self.packs[case.content] = packs_of(case.content)
        return self.packs[case.content]

    def gradients(self, case: Case) -> tuple[float, Path]:
        file = self.folder / f"{abs(hash(case))}.pt"
        if case not in self.losses:
            (self.losses[case],) = self.pool.run(
                1, reference, Layout(1, {}, case), self.packs_for(case), file
            )
        return self.losses[case], file

    def curve(self, case: Case) -> list[float]:
        if case not in self.curves:
            (self.curves[case],) = self.pool.run(
                1, curve, Layout(1, {}, case), self.packs_for(case)
            )
        return self.curves[case]


@pytest.fixture(scope="module")
def references(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(pool, tmp_path_factory.mktemp("references"))


def marked(name: str) -> object:
    is_later = name.startswith(("adapters", "live", "stored"))
    later = pytest.mark.long if is_later else pytest.mark.parity
    return pytest.param(name, marks=() if name in QUICK else later)


@pytest.mark.parametrize("name", [marked(name) for name in LAYOUTS])
def test_a_layout_trains_as_one_process(
    name: str,
    references: References,
    pool: RankPool,
    record_property: Callable[[str, object], None],
) -> None:
    layout = LAYOUTS[name]
    packs = references.packs_for(layout.case)
    expected, file = references.gradients(layout.case)
    found = pool.run(layout.ranks, compare, layout, packs, file)
    loss = max(abs(loss / expected - 1) for loss, _ in found)
    error, parameter = worst([errors for _, errors in found])
    losses = pool.run(layout.ranks, curve, layout, packs)
    off = max(
        abs(a - b)
        for rank in losses
        for a, b in zip(rank, references.curve(layout.case), strict=True)
    )
    record_property("row", (name, layout.ranks, loss, error, parameter, off))
    assert loss <= GRADIENTS and error <= GRADIENTS, (
        f"loss {loss:.1e}, gradient of {parameter} {error:.1e}"
    )
    assert off <= CURVES
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.parametrize(
    ("mistake", "layout"),
    [
        ("features_not_reduced", dense(2, tensor=2)),
        pytest.param("experts_reduced_over_all", mixture(2, expert=2), marks=pytest.mark.parity),
        ("adapters_not_reduced", replace(dense(2, tensor=2), case=ADAPTERS)),
        ("positions_after_packing", dense(2, context=2)),
        ("divided_per_micro_batch", dense(2)),
    ],
)
def test_a_mistake_turns_the_table_red(
    mistake: str, layout: Layout, references: References, pool: RankPool
) -> None:
    """Controls: what trainers get wrong in silence is an error far above the tolerance here."""
    packs = references.packs_for(layout.case)
    _, file = references.gradients(layout.case)
    found = pool.run(layout.ranks, compare, replace(layout, mistake=mistake), packs, file)
    error, _ = worst([errors for _, errors in found])
    assert error > 1000 * GRADIENTS


def losses_of(packs: list[TestPack], experts: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process; runs on a rank of the pool."""
    stage, loss = backward(Layout(1, {}, Case(experts=experts, balance=0.0)), packs)
    return loss, {name: parameter.main_grad.clone() for name, parameter in trainable(stage).items()}


@pytest.mark.parametrize("experts", [0, 8])
def test_packed_equals_unpacked(experts: int, pool: RankPool) -> None:
    """The samples of all packs each in a micro-batch of its own give the same loss and gradients."""
    packed, alone = (
        packs_of("everything"),
        [pack for samples in CONTENTS["everything"] for pack in packs_of_each(samples)],
    )
    ((loss, gradients),), ((other, others),) = (
        pool.run(1, losses_of, packs, experts) for packs in (packed, alone)
    )
    assert abs(other / loss - 1) <= GRADIENTS
    for name, gradient in gradients.items():
        assert float((others[name] - gradient).norm()) <= GRADIENTS * float(gradient.norm()), name


def twice(experts: int, packs: list[TestPack]) -> bool:
    """Whether two runs of the same steps end in the same bits; runs on every rank of the pool."""
    layout = Layout(2, {"expert": 2} if experts else {"tensor": 2}, Case(experts=experts))
    runs = []
    for _ in range(2):
        topologies.be_deterministic()
        stage = build(layout, sharded=True)
        mine = deal(packs, stage.topology, False)
        losses = [train_step(stage, mine).loss for _ in range(3)]  # type: ignore[arg-type]
        torch.use_deterministic_algorithms(False)
        runs.append(
            (
                losses,
                [
                    parameter.detach().clone()
                    for chunk in stage.model_parts
                    for parameter in chunk.parameters()
                ],
            )
        )
    (first, weights), (second, others) = runs
    return first == second and all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("experts", [0, 8])
def test_fixed_order_gives_the_same_bits(experts: int, pool: RankPool) -> None:
    assert pool.run(2, twice, experts, packs_of("everything")) == [True, True]


def disagree(packs: list[TestPack], fault: str) -> list[float] | str:
    """What a rank's micro-batches weigh after agreeing, where rank 1 has read something else; runs on every rank of the pool."""
    topology = topologies.start(ParallelConfig(tensor=2), torch.device("cpu"))
    mine: list[Any] = deal(packs, topology, False)
    if topology.rank == 1 and fault == "picture":
        mine[0] = replace(mine[0], lost=torch.tensor([False, True, False, False]))
    if topology.rank == 1 and fault == "text":
        mine[0] = replace(mine[0], input_ids=torch.zeros_like(mine[0].input_ids))
    try:
        return [float(batch.loss_weights.sum()) for batch in agree_on_unreadable(mine, topology)]
    except RuntimeError as error:
        return str(error)


def test_ranks_that_share_a_pack_agree_on_what_is_read(pool: RankPool) -> None:
    packs = packs_of("everything")
    whole = [float(pack.loss_weights.sum()) for pack in packs]
    second = slice(int(packs[0].cu_seqlens[1]), int(packs[0].cu_seqlens[2]))
    lost = float(packs[0].loss_weights[second].sum())
    assert lost > 0
    assert pool.run(2, disagree, packs, "") == [whole, whole]
    assert (
        pool.run(2, disagree, packs, "picture")
        == [pytest.approx([whole[0] - lost, *whole[1:]])] * 2
    )
    told = pool.run(2, disagree, packs, "text")
    assert all("have read different samples" in text for text in told)
