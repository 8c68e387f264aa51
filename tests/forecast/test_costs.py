"""Seconds of operations and collectives. References: measured speeds that others have published, nccl-tests' factors of the bus
bandwidth (doc/PERFORMANCE.md), NCCL's latencies (src/graph/tuning.cc)."""

import math
from dataclasses import replace

import pytest

from visionloom.forecast.costs import (
    Streams,
    Work,
    collective_seconds,
    message_seconds,
    operation_seconds,
)
from visionloom.forecast.machine import Machine, machine
from visionloom.forecast.trace.events import (
    Collective,
    Direction,
    FlightMark,
    Kernel,
    Operation,
    Slot,
    SlotKind,
    SlotMemory,
)
from visionloom.parallel.parts import LANGUAGE

H100, H200, B200 = machine("h100"), machine("h200"), machine("b200")
LARGE = 1 << 34
"""Bytes at which latency does not count."""


def operation(
    kernel: Kernel,
    work: float,
    size: int = 0,
    dtype: str = "bf16",
    direction: Direction = Direction.FORWARD,
) -> Operation:
    return Operation("aten::x", LANGUAGE, direction, kernel, dtype, work, work, size)


@pytest.mark.parametrize(
    ("batch", "rows", "columns", "inner", "tflops"),
    [
        # openxla/xla, xla/service/gpu/model/matmul_interpolator_data.h, sm_90, bf16.
        (1, 256, 256, 1024, 19.46),
        (2, 256, 1024, 256, 43.02),
        (1, 512, 512, 1024, 71.24),
        (1, 1024, 1024, 256, 82.04),
        (1, 256, 2048, 2048, 215.8),
        (1, 1024, 1024, 4096, 470.1),
        (1, 2048, 2048, 1024, 493.9),
        (1, 1024, 4096, 2048, 634.2),
        (1, 4096, 4096, 1024, 677.4),
        (4, 4096, 4096, 2048, 764.6),
        (4, 4096, 2048, 4096, 808.7),
    ],
)
def test_products_are_as_fast_as_measured(
    batch: int, rows: int, columns: int, inner: int, tflops: float
) -> None:
    work = 2.0 * batch * rows * columns * inner
    size = 2 * batch * (rows * inner + inner * columns + rows * columns)
    seconds = operation_seconds(operation(Kernel.PRODUCT, work, size), H100)
    assert seconds == pytest.approx(work / tflops / 1e12, rel=0.15)


def test_an_operation_takes_the_longest_of_its_bounds() -> None:
    assert operation_seconds(operation(Kernel.OTHER, 0.0, 8), H100) == H100.kernel_start
    moved = operation_seconds(operation(Kernel.OTHER, 0.0, 2_847_500_000), H100)
    assert moved == pytest.approx(1e-3)
    # One row by a large matrix: its weights are read once.
    narrow = operation_seconds(operation(Kernel.PRODUCT, 2 * 8192**2, 2 * 8192**2), H100)
    assert narrow == pytest.approx(2 * 8192**2 / 2.8475e12)


def test_fp32_products_have_no_tensor_cores() -> None:
    work = 1e13
    half, whole = (
        operation_seconds(operation(Kernel.PRODUCT, work, dtype=dtype), H100)
        for dtype in ("bf16", "fp32")
    )
    assert whole / half == pytest.approx(989 / 67, rel=1e-3)


def test_attention_runs_backward_at_another_speed() -> None:
    """torch's flash kernel, H100, in train steps of 2B and 8B: measured for recipes/gpu/h100.yaml."""
    for direction, tflops in [
        (Direction.FORWARD, 272),
        (Direction.RECOMPUTE, 272),
        (Direction.BACKWARD, 232),
    ]:
        attention = operation(Kernel.ATTENTION, 1e12, direction=direction)
        assert 1 / operation_seconds(attention, H100) == pytest.approx(tflops, rel=0.05)


def test_attention_has_the_speed_of_its_kernels() -> None:
    """On packs of a 2B step cuDNN's dense calls, about as fast as FlashAttention-3, took 70 ms for FlashAttention-2's 112."""
    timed = H100.with_attention("flash3", "h100")
    for direction in Direction:
        attention = operation(Kernel.ATTENTION, 1e12, direction=direction)
        flash2, flash3 = (operation_seconds(attention, gpu) for gpu in (H100, timed))
        assert flash3 / flash2 == pytest.approx(70 / 112, rel=0.01)
    forward = operation(Kernel.ATTENTION, 1e12)
    # 0.44 of 989 TFLOP/s.
    assert operation_seconds(forward, timed) == pytest.approx(1 / 435.16)
    large = operation(Kernel.PRODUCT, 1e12)
    assert operation_seconds(large, timed) == operation_seconds(large, H100)


def seconds(name: str, size: int, ranks: range, gpu: Machine) -> float:
    collective = Collective(name, "data", LANGUAGE, Direction.FORWARD, size)
    return collective_seconds(collective, ranks, gpu)


FACTORS = {
    # nccl-tests: bus bandwidth over bytes a second, for n ranks.
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_to_all": lambda n: (n - 1) / n,
    "broadcast": lambda n: 1.0,
    "reduce": lambda n: 1.0,
}


def bus_bandwidth(name: str, size: int, ranks: range, gpu: Machine) -> float:
    return size / seconds(name, size, ranks, gpu) * FACTORS[name](len(ranks)) / 1e9


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_bus_bandwidth_inside_a_node_is_that_of_its_links(name: str, ranks: int) -> None:
    assert bus_bandwidth(name, LARGE, range(ranks), H100) == pytest.approx(363, rel=0.01)


@pytest.mark.parametrize("name", FACTORS)
def test_one_rank_of_each_node_has_one_adapter(name: str) -> None:
    assert bus_bandwidth(name, LARGE, range(0, 64, 8), H100) == pytest.approx(45.6, rel=0.01)


@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "reduce_scatter"])
def test_rings_leave_a_node_by_all_adapters_of_the_group(name: str) -> None:
    # Two of a node's ranks: 0, 4, 8, 12, ...
    assert bus_bandwidth(name, LARGE, range(0, 32, 4), H100) == pytest.approx(2 * 45.6, rel=0.01)
    # Eight adapters of a node are as fast as its NVLink.
    assert bus_bandwidth(name, LARGE, range(64), H100) == pytest.approx(363, rel=0.02)


def test_all_to_all_between_nodes_is_bound_by_each_rank_s_adapter() -> None:
    """Of 32 parts 24 leave the node."""
    expected = LARGE * 24 / 32 / 45.6e9
    assert seconds("all_to_all", LARGE, range(32), H100) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("gpu", "ranks", "size", "measured"),
    [
        # stas00/ml-engineering, network: bus bandwidth of all_reduce in GB/s by MiB; H200 on one node, B200 on four.
        (H200, 8, 1, 39.93),
        (H200, 8, 16, 219.89),
        (H200, 8, 64, 346.51),
        (B200, 32, 1024, 361.99),
        (B200, 32, 16384, 381.80),
    ],
)
def test_all_reduce_is_as_fast_as_measured(
    gpu: Machine, ranks: int, size: int, measured: float
) -> None:
    assert bus_bandwidth("all_reduce", size << 20, range(ranks), gpu) == pytest.approx(
        measured, rel=0.25
    )


def test_small_sums_go_by_a_tree_and_large_ones_by_a_ring() -> None:
    """1,024 ranks on 128 nodes: the ring has 2,046 steps, the tree 7 in a node and log2(128) between nodes, both up and down."""
    tree = 8.4e-6 + 2 * (7 * 1.9e-6 + 7 * 4.0e-6)
    assert seconds("all_reduce", 8, range(1024), H100) == pytest.approx(tree, rel=1e-3)
    # A gather has no tree: 896 steps inside nodes, 127 between them.
    ring = 8.4e-6 + 896 * 1.9e-6 + 127 * 4.0e-6
    assert seconds("all_gather", 8, range(1024), H100) == pytest.approx(ring, rel=1e-3)
    assert seconds("barrier", 0, range(8), H100) == pytest.approx(8.4e-6 + 14 * 1.9e-6)
    large = LARGE * 2 * 7 / 8 / 363e9
    assert seconds("all_reduce", LARGE, range(8), H100) == pytest.approx(large, rel=1e-2)


@pytest.mark.parametrize("name", FACTORS)
def test_a_single_rank_costs_nothing_and_more_bytes_cost_more(name: str) -> None:
    assert seconds(name, LARGE, range(1), H100) == 0.0
    times = [seconds(name, 1 << power, range(16), H100) for power in range(0, 36, 3)]
    assert times == sorted(times) and math.isfinite(times[-1])


def test_a_message_takes_the_link_between_its_ranks() -> None:
    near, far = message_seconds(LARGE, 0, 7, H100), message_seconds(LARGE, 7, 8, H100)
    assert near == pytest.approx(LARGE / 363e9, rel=1e-3)
    assert far == pytest.approx(LARGE / 45.6e9, rel=1e-3)


def slot(*counts: tuple[Operation, int], size: int = 0) -> Slot:
    messages = ((Collective("send", "pipeline", LANGUAGE, Direction.FORWARD, LARGE), 1),)
    gathers = ((Collective("all_gather", "tensor", LANGUAGE, Direction.FORWARD, size), 2),)
    memory = SlotMemory(0, 0, 0)
    return Slot(SlotKind.FORWARD, 0, 0, counts, gathers if size else messages, memory)


def test_work_is_added_up_by_part_and_axis() -> None:
    copy = operation(Kernel.OTHER, 0.0, 2_847_500_000)
    groups = {"tensor": range(8), "pipeline": (0, 8)}
    alone = Streams()
    alone.run(Work.of([slot(size=LARGE)], {"tensor": (3,)}, H100))
    assert not alone.communication
    work, streams = Work.of([slot((copy, 3)), slot(size=LARGE)], groups, H100), Streams()
    gather = seconds("all_gather", LARGE, range(8), H100)
    assert streams.run(work) == streams.now == pytest.approx(3e-3 + 2 * gather)
    assert work.parts == pytest.approx({LANGUAGE: 3e-3})
    assert streams.communication == pytest.approx({"tensor": 2 * gather})
    # Messages are launched here, and take their time in the schedule.
    assert work.launches == 3 + 1 + 2
    assert streams.waits_for_host == 0


def test_a_collective_costs_what_computation_does_not_cover() -> None:
    """Two gathers of an axis follow each other, one of another axis runs beside them."""
    copy = operation(Kernel.OTHER, 0.0, 2_847_500_000)  # 1 ms
    calls = [
        Collective("all_gather", axis, LANGUAGE, Direction.FORWARD, LARGE)
        for axis in ("data", "data", "tensor")
    ]
    begins = [FlightMark((), (), number, call) for number, call in enumerate(calls)]
    waits = [
        FlightMark(((copy, 1),), (), 2),
        FlightMark((), (), 0),
        FlightMark(((copy, 1),), (), 1),
        FlightMark((), ()),
    ]
    played = replace(slot((copy, 2)), marks=(*begins, *waits))
    groups = {"data": range(8), "tensor": range(4), "pipeline": (0, 8)}
    data, tensor = (seconds("all_gather", LARGE, range(ranks), H100) for ranks in (8, 4))
    # All three begin at once; then 1 ms, the tensor gather, the first data gather, 1 ms, the second.
    assert tensor < data and data > 2e-3
    streams = Streams()
    streams.run(Work.of([played], groups, H100))
    assert streams.communication["tensor"] == pytest.approx(tensor - 1e-3)
    assert streams.communication["data"] == pytest.approx(data - tensor + data - 1e-3)


@pytest.mark.parametrize("idle", [0.0, 1e-3, 1.0])
def test_a_collective_runs_while_its_rank_waits_for_another_stage(idle: float) -> None:
    """A gather begins in one slot; the next, which waits for it, begins `idle` seconds after that."""
    call = Collective("all_gather", "data", LANGUAGE, Direction.FORWARD, LARGE)
    groups = {"data": range(8), "pipeline": (0, 8)}
    begins = replace(slot(), marks=(FlightMark((), (), 0, call), FlightMark((), ())))
    waits = replace(slot(), marks=(FlightMark((), (), 0), FlightMark((), ())))
    streams = Streams()
    begun = streams.run(Work.of([begins], groups, H100))
    done = streams.run(Work.of([waits], groups, H100), begun + idle)
    gather = seconds("all_gather", LARGE, range(8), H100)
    assert done == pytest.approx(max(gather, begun + idle), rel=1e-2)
    assert streams.communication["data"] == pytest.approx(max(0.0, gather - idle), abs=1e-4)


def test_many_small_kernels_wait_for_the_host() -> None:
    tiny = operation(Kernel.OTHER, 0.0, 8)
    work = Work.of([slot((tiny, 999))], {"pipeline": (0, 8)}, H100)
    assert Streams().run(work, clock=2.0) == pytest.approx(2.0 + 1000 * H100.launch)
    assert work.parts[LANGUAGE] == pytest.approx(999 * H100.kernel_start)


def test_a_mask_does_not_say_in_which_dtype_a_kernel_computes() -> None:
    """A mask [rows, keys] of a long pack is larger than the queries, and bf16 attention stays bf16."""
    import torch

    from visionloom.forecast.trace.operations import dtype_of

    query = torch.empty(1, 2, 8, 4, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(8, 4096, dtype=torch.bool, device="meta")
    assert dtype_of([query, query, query, mask], [query]) == "bf16"
    # What has no numbers to compute with is named as it is.
    assert dtype_of([mask], [mask]) == "bool"


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_a_product_that_is_added_reads_and_writes_its_sum(parts: int) -> None:
    """Ten rows a part, bf16, 24 and 16 wide: two operations for each pair, however the rows are grouped; 0 parts: no groups."""
    import torch

    from visionloom.forecast.trace.operations import Call, Cost, cost_of, kind_of, tensors_in
    from visionloom.model.kernels import product  # noqa: F401  it defines them

    name, experts = ("add_grouped_product_", (4,)) if parts else ("add_product_", ())
    with torch.device("meta"):
        total = torch.empty(*experts, 24, 16)
        rows, columns = (torch.empty(10, width, dtype=torch.bfloat16) for width in (24, 16))
        ends = torch.empty(4, dtype=torch.int32)
    factors = ([rows] * parts, [columns] * parts, [ends] * parts) if parts else (rows, columns)
    operator = getattr(torch.ops.visionloom, name).default
    call = Call(kind_of(operator), operator, (total, *factors), {})
    cost = cost_of(call, [total, *tensors_in(factors)], [total])
    times = parts or 1
    flops = times * 2.0 * 10 * 24 * 16
    moved = 2 * 4 * total.numel() + times * 2 * 10 * (24 + 16) + parts * 4 * 4
    assert cost == Cost(Kernel.PRODUCT, flops, flops, moved)


@pytest.mark.parametrize(
    ("name", "lists", "passes"),
    [
        ("_foreach_mul_.Scalar", 1, 2),
        ("_foreach_copy_.default", 2, 2),
        ("_foreach_zero_.default", 1, 1),
        # Weights, gradients and two moments are read, all but the gradients written.
        ("_fused_adamw_.default", 4, 7),
    ],
)
def test_operations_on_lists_write_what_they_change(name: str, lists: int, passes: int) -> None:
    """They return nothing; `passes`: how often a tensor of each list's size is read or written."""
    import torch

    from visionloom.forecast.trace.operations import Call, cost_of, kind_of, tensors_in

    packet, overload = name.split(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload)
    args = [[torch.empty(24, device="meta"), torch.empty(16, device="meta")] for _ in range(lists)]
    call = Call(kind_of(operator), operator, tuple(args), {})
    assert cost_of(call, tensors_in(args), []).bytes == passes * 4 * (24 + 16)
