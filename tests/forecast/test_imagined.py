"""An imagined rank does what a real one does: operations, collectives and memory of a step, layout by layout.

Reference: the same recorder on the real ranks of gloo processes, with real tensors and messages; experts are chosen as stated
in both.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from visionloom.forecast.trace.events import (
    Category,
    Direction,
    Kernel,
    Mixed,
    RankTrace,
    SlotKind,
    Wait,
)
from visionloom.model import kept as kept_module
from visionloom.parallel.parts import LANGUAGE, LOSS
from visionloom.tests.forecast.imagined import (
    collectives,
    extra_copy,
    flops,
    host_wait,
    imagined,
    launches,
    mask_on_the_host,
    real,
)
from visionloom.tests.model.reference import TestPack
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.layouts import Case, Layout, packs_of
from visionloom.tests.train.test_parity import LAYOUTS

QUICK = (
    "tensor 2",
    "pipeline 2, virtual 2, levels travel",
    "tensor 2 x expert 2",
    "stored teacher, tensor 2",
)
# On a CPU host and device are one memory: what is brought to the host there has not left the device.
LEFT_OUT = {name for name, layout in LAYOUTS.items() if layout.config.offload_activations}
# A forecast leaves a live teacher out, and says so.
LIVE = "live teacher"
COMPARED = [name for name in LAYOUTS if name not in LEFT_OUT and not name.startswith(LIVE)]
CLOSE = 0.02
"""Largest relative difference of bytes."""


def explained(difference: Counter[Any], real_has_more: bool) -> Counter[Any]:
    """A difference of launches without what docs/decisions.md explains."""
    rest: Counter[Any] = Counter()
    for key, count in difference.items():
        _, name, part, direction = key
        # gloo scatters sums by adding up everything, and copies a rank's part out of it.
        from_gloo = real_has_more and name == "aten::copy_"
        # torch makes a tensor of the device of a number that it chooses by a mask, where there is no content.
        from_meta = not real_has_more and name == "aten::scalar_tensor" and part == LOSS
        if not (from_gloo or (from_meta and direction == Direction.FORWARD)):
            rest[key] = count
    return rest


_packs: dict[str, list[TestPack]] = {}


def packs_for(content: str) -> list[TestPack]:
    """Micro-batches with positions from transformers, made once."""
    if content not in _packs:
        _packs[content] = packs_of(content)
    return _packs[content]


def marked(name: str) -> object:
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.long)


@pytest.mark.parametrize("name", [marked(name) for name in COMPARED])
def test_an_imagined_rank_does_what_a_real_one_does(name: str, pool: RankPool) -> None:
    layout = LAYOUTS[name]
    packs = packs_for(layout.case.content)
    there = pool.run(layout.ranks, real, layout, packs)
    (imaginary,) = pool.run(1, imagined, layout, packs, list(range(layout.ranks)))
    for own, other in zip(there, imaginary, strict=True):
        compare(own, other)


def waits(trace: RankTrace) -> set[str]:
    """Lines that wait for a value of the device; which copies block, only a device of its own shows."""
    return {wait.place for wait in trace.waits if wait.kind in ("item", "copy to the host")}


def largest_message(trace: RankTrace) -> int:
    """Bytes of the largest message to another stage; 0 without."""
    sizes = [
        collective.bytes
        for slot in trace.slots
        for collective, _ in slot.collectives
        if collective.name in ("send", "receive")
    ]
    return max(sizes, default=0)


def compare(own: RankTrace, other: RankTrace) -> None:
    """Fail where the trace of a real rank and that of the imagined one differ."""
    assert flops(own) == flops(other)
    assert collectives(own) == collectives(other)
    assert explained(launches(own) - launches(other), True) == Counter()
    assert explained(launches(other) - launches(own), False) == Counter()
    # A thread of gloo lets go of a message when it has sent it, a little earlier or later.
    close = max(CLOSE * own.peak.bytes, 2 * largest_message(own))
    assert other.peak.bytes == pytest.approx(own.peak.bytes, abs=close)
    assert other.allocated == pytest.approx(own.allocated, rel=CLOSE)
    # Numbers that a module keeps for itself are the host's on a CPU, if it names no device for them.
    for category in (Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER):
        assert other.at_rest.get(category) == own.at_rest.get(category), category
    assert own.mixed == other.mixed == ()
    assert waits(own) == waits(other)


@pytest.mark.parametrize("mistake", [extra_copy, host_wait, mask_on_the_host])
def test_a_mistake_turns_the_comparison_red(
    mistake: Callable[[Tensor], Tensor], pool: RankPool
) -> None:
    """Controls: each is found, and the last two are named by their line."""
    layout = LAYOUTS["tensor 2"]
    packs = packs_for(layout.case.content)
    ((right,), (wrong,)) = (
        pool.run(1, imagined, layout, packs, [0], each)[0] for each in (None, mistake)
    )
    with pytest.raises(AssertionError):
        compare(right, wrong)
    # Both waits of a step that is right are in the optimizer and at its end.
    inside = [wait for wait in wrong.waits if wait.per_micro_batch]
    named = f"tests/forecast/imagined.py:{mistake.__code__.co_firstlineno + 2} {mistake.__name__}"
    if mistake is host_wait:
        assert inside == [Wait("item", named, len(packs), True)]
    if mistake is mask_on_the_host:
        assert Mixed("aten::mul", named, len(packs)) in wrong.mixed


def imagined_with_all_moved(layout: Layout, packs: list[TestPack]) -> list[RankTrace]:
    """A step of the first rank: a small model's activations are moved too, and not all of them fetched at once."""
    with mock.patch.multiple(kept_module, LEAST_BYTES=0, AHEAD_BYTES=0):
        return imagined(layout, packs, [0])


def test_activations_in_host_memory_cross_the_bus_and_leave_the_device(pool: RankPool) -> None:
    """What goes to the host comes back, byte for byte, and at the peak it is not there."""
    names = ("tensor 2", "activations in host memory")
    packs = packs_for(LAYOUTS[names[0]].case.content)
    ((kept,), (offloaded,)) = (
        pool.run(1, imagined_with_all_moved, LAYOUTS[name], packs)[0] for name in names
    )
    assert offloaded.peak.bytes < kept.peak.bytes
    moved: Counter[tuple[str, SlotKind]] = Counter()
    for slot in offloaded.slots:
        for operation, number in slot.operations:
            if operation.kernel == Kernel.TRANSFER and operation.part == LANGUAGE:
                moved[operation.name, slot.kind] += operation.bytes * number
    assert moved["aten::copy_", SlotKind.FORWARD] > 0
    assert moved["aten::_to_copy", SlotKind.BACKWARD] == moved["aten::copy_", SlotKind.FORWARD]


def test_slots_follow_the_schedule(pool: RankPool) -> None:
    """Every micro-batch passes each chunk of a stage forward and backward; the optimizer comes last."""
    layout = LAYOUTS["pipeline 2, virtual 2, levels travel"]
    packs = packs_for(layout.case.content)
    (traces,) = pool.run(1, imagined, layout, packs, [0, 1])
    for trace in traces:
        passes = Counter(
            (slot.kind, slot.chunk, slot.micro_batch)
            for slot in trace.slots
            if slot.kind in (SlotKind.FORWARD, SlotKind.BACKWARD)
        )
        expected = [
            (kind, chunk, number)
            for kind in (SlotKind.FORWARD, SlotKind.BACKWARD)
            for chunk in range(2)
            for number in range(len(packs))
        ]
        assert passes == Counter(expected)
        assert trace.slots[0].kind == SlotKind.BEGIN
        assert trace.slots[-1].kind == SlotKind.END
        before = [slot.memory.before for slot in trace.slots]
        after = [slot.memory.after for slot in trace.slots]
        assert before[1:] == after[:-1]
        assert max(slot.memory.peak for slot in trace.slots) == trace.peak.bytes


@pytest.mark.parametrize(("parallel", "each"), [({}, 0), ({"expert": 2}, 1)])
@pytest.mark.parametrize("recompute", ["none", "full", "mlp"])
def test_a_mixture_waits_once_a_layer(
    parallel: dict[str, Any], each: int, recompute: str, pool: RankPool
) -> None:
    """With all experts on a rank it never does, and a backward pass never does."""
    case = Case(experts=8, content="text")
    layout = Layout(2, parallel | {"recompute": recompute}, case)
    ((trace,),) = pool.run(1, imagined, layout, packs_for("text"), [0])
    inside = [wait for wait in trace.waits if wait.per_micro_batch]
    layers = case.model.text.layers
    assert sum(wait.count for wait in inside) == each * layers * trace.micro_batches
    assert all(wait.place.startswith("model/dispatch.py") for wait in inside)
