"""The numbers of a GPU: read, bounded, and with a source each. References: NVIDIA's data sheets, and the list of files."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from visionloom.common.errors import UserError
from visionloom.common.settings import options, without_rules
from visionloom.forecast import machine as machines
from visionloom.forecast.machine import (
    GIB,
    Machine,
    machine,
    machine_names,
    planned_attention,
)
from visionloom.launch.composing.explain import groups

FILES = Path(__file__).resolve().parents[2] / "recipes" / "gpu"
SHEETS = {
    # Memory in GB, TFLOP/s in bf16 without sparsity, memory in TB/s, NVLink in GB/s both ways, network in Gb/s.
    "a100_80": (80, 312, 2.039, 600, 200),
    "h100": (80, 989, 3.35, 900, 400),
    "h200": (141, 989, 4.8, 900, 400),
    "b200": (180, 2250, 8.0, 1800, 400),
}


def test_the_four_machines_are_there() -> None:
    assert machine_names() == sorted(SHEETS)


@pytest.mark.parametrize("name", SHEETS)
def test_a_machine_is_that_of_its_data_sheet(name: str) -> None:
    """What is measured is below what is promised, and not by more than a third."""
    memory, tflops, bandwidth, link, network = SHEETS[name]
    gpu = machine(name)
    assert gpu.bf16_tflops == tflops
    assert 0.95 * bandwidth * 1e3 <= gpu.memory_gbps <= bandwidth * 1e3
    assert 0.9 * memory < gpu.usable_bytes / GIB < memory
    assert 2 / 3 * link / 2 < gpu.inside_gbps < link / 2
    assert 2 / 3 * network / 8 < gpu.between_gbps < network / 8
    # A tensor core's gain over the others.
    assert 10 < gpu.bf16_tflops / gpu.fp32_tflops < 30


@pytest.mark.parametrize("name", SHEETS)
def test_every_number_has_its_source(name: str) -> None:
    lines = (FILES / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if line and not line.startswith("#")]
    assert [line.partition(":")[0] for line in values] == [item.name for item in fields(Machine)]
    assert [line for line in values if not re.search(r"  # .{10,}", line)] == []


RUNS = {
    # By the authors: FlashAttention-3 is for Hopper, FlashAttention-4 for Hopper and Blackwell.
    "a100_80": [],
    "h100": ["flash3", "flash4"],
    "h200": ["flash3", "flash4"],
    "b200": ["flash4"],
}


@pytest.mark.parametrize("name", SHEETS)
def test_kernels_of_attention_have_a_speed_where_they_run(name: str) -> None:
    gpu = machine(name)
    # torch's own are FlashAttention-2.
    assert {planned_attention(each) for each in ("auto", "torch", "flash2")} == {"flash2"}
    assert all(gpu.with_attention(each, name) == gpu for each in ("auto", "torch", "flash2"))
    for kernels in ("flash3", "flash4"):
        if kernels in RUNS[name]:
            timed = gpu.with_attention(kernels, name)
            # Published speedups are 1.5 to 2 on Hopper (arXiv 2407.08608), up to 3.5 on Blackwell, where flash2 has no kernels of its own.
            for new, old in [
                (timed.attention_forward_share, gpu.attention_forward_share),
                (timed.attention_backward_share, gpu.attention_backward_share),
            ]:
                assert 1.5 < new / old < 3.5
            assert timed.usable_bytes == gpu.usable_bytes and timed.peak == gpu.peak
            continue
        with pytest.raises(UserError) as caught:
            gpu.with_attention(kernels, name)
        assert caught.value.lines == [
            f"model.attention={kernels} cannot be planned: recipes/gpu/{name}.yaml says no speed of these kernels on gpu={name}:"
            " use model.attention=auto, or another gpu"
        ]


def test_an_h200_is_the_chip_of_an_h100() -> None:
    """Its multiprocessors are the same, so is what they compute; memory is not."""
    shares = [item.name for item in fields(Machine) if item.name.endswith(("ward_share", "tflops"))]
    assert len(shares) == 2 + 3 * 2
    for name in [*shares, "product_share", "product_start"]:
        assert getattr(machine("h200"), name) == getattr(machine("h100"), name)


def test_tensors_have_what_is_not_reserved() -> None:
    gpu = Machine(memory_gib=80.0, reserved_gib=2.5)
    assert gpu.usable_bytes == 77.5 * GIB


def test_every_number_has_bounds() -> None:
    assert list(without_rules(Machine)) == []
    assert len(list(options(Machine()))) == len(fields(Machine))


def test_ranks_fill_one_node_after_the_other() -> None:
    assert [machine("h100").node(rank) for rank in (0, 7, 8, 1023)] == [0, 0, 1, 127]


def test_an_unknown_machine_is_one_line() -> None:
    with pytest.raises(UserError) as caught:
        machine("h-100")
    assert str(caught.value) == (
        "gpu=h-100 is unknown (did you mean h100?): use one of a100_80, b200, h100, h200"
    )
    with pytest.raises(UserError, match=r"^gpu=\.\./model/tiny is unknown"):
        machine("../model/tiny")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (r"launch: .*\n", "", r"^recipes/gpu/h100\.yaml: launch=0 must be above 0"),
        (
            r"node_ranks: 8",
            "node_ranks: 0",
            r"^recipes/gpu/h100\.yaml: node_ranks=0 must be at least 1",
        ),
        (r"node_ranks: 8", "node_ranks: eight", r"^recipes/gpu/h100\.yaml: .*node_ranks"),
        (r"launch: ", "speed: 1\nlaunch: ", r"^recipes/gpu/h100\.yaml: .*speed"),
        (
            r"flash3_forward_share: 0",
            "flash3_forward_share: 7",
            r"^recipes/gpu/h100\.yaml: flash3_forward_share=7\.44 must be above 0 and at most 1",
        ),
    ],
)
def test_a_file_that_was_spoilt_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, expected: str
) -> None:
    text = (FILES / "h100.yaml").read_text()
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "h100.yaml").write_text(re.sub(old, new, text, count=1))
    monkeypatch.setattr(machines, "files", lambda _: tmp_path)
    with pytest.raises(UserError, match=expected) as caught:
        machine("h100")
    assert "\n" not in str(caught.value)


def test_a_gpu_is_no_ingredient_of_a_run() -> None:
    assert FILES.is_dir()
    assert "gpu" not in groups() and "model" in groups()
