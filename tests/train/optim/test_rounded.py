"""Moments in bf16: as good as fp32, right in the mean, the same in any layout and after a resumption.

References: the same steps with moments in fp32; the value that is rounded; one process; an uninterrupted run.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visionloom.common.errors import UserError
from visionloom.launch.configure import compose
from visionloom.model.sharding import canonical_parameters, cut, full_shape
from visionloom.tests.model.reference import TestPack
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.checkpoint.test_checkpoint import (
    bits,
    layout_of,
    save,
    save_again,
    tensors_in,
    uninterrupted,
)
from visionloom.tests.train.layouts import Case, Layout, build, curve, packs_of
from visionloom.train.optim.moments import TensorPlace, random_bits, rounded
from visionloom.train.optim.rounded import RoundedAdamW, place_of

STOCHASTIC = Case(content="images", moments="bf16_stochastic")
NEAREST = replace(STOCHASTIC, moments="bf16")


@pytest.fixture(scope="module")
def packs() -> list[TestPack]:
    return packs_of("images")


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    """The mean of many roundings is the value, within four deviations; that of roundings to the nearest is not."""
    value, count = 1.0 + 0.3 * 2**-7, 1 << 16
    drawn = random_bits(count, 7, [0, count, count, 0], torch.device("cpu"))
    for half in (drawn & 0xFFFF, drawn >> 16):
        for sign in (1.0, -1.0):
            values = torch.full((count,), sign * value)
            made = rounded(values, half).double()
            assert set(made.tolist()) == {sign, sign * (1.0 + 2**-7)}
            error = abs(float(made.mean()) - sign * value)
            assert error < 4 * 0.46 * 2**-7 / count**0.5
            assert abs(float(values.bfloat16().double().mean()) - sign * value) > 10 * error


def test_random_bits_are_even_and_apart() -> None:
    """Each bit is set half of the time, and keys, neighbours and halves have nothing to do with each other."""
    count = 1 << 16
    where = [0, count, count, 0]
    first, second = (random_bits(count, key, where, torch.device("cpu")) for key in (1, 2))
    for numbers in (first, second, first ^ second, first[1:] ^ first[:-1], first ^ (first >> 16)):
        for bit in range(16):
            assert abs(float((numbers >> bit & 1).double().mean()) - 0.5) < 0.01
    # A stretch from the middle has the same numbers.
    part = random_bits(100, 1, [500, count, count, 0], torch.device("cpu"))
    assert torch.equal(part, first[500:600])


def places_of_parts(layout: Layout) -> list[str]:
    """Names of parameters whose places are not those of their numbers in the full tensor; on a rank of the pool."""
    stage = build(layout, sharded=False)
    wrong = []
    for part in stage.model_parts:
        for name, parameter in canonical_parameters(part):
            place = place_of(name, parameter, 0, stage.topology)
            index = torch.arange(parameter.numel())
            ours = index // place.run * place.distance + place.first + index % place.run
            shape = full_shape(name, parameter, stage.topology)
            full = torch.arange(torch.Size(shape).numel()).view(shape)
            if not torch.equal(ours, cut(name, full, parameter, stage.topology).flatten()):
                wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    ("parallel", "experts"),
    [({"tensor": 2}, 0), ({"tensor": 2, "expert": 2}, 8), ({"tensor": 2, "expert_tensor": 2}, 8)],
)
def test_places(parallel: dict[str, int], experts: int, pool: RankPool) -> None:
    """Reference: the cut that draws weights, on a tensor of its own places."""
    layout = Layout(2, parallel, Case(experts=experts))
    assert pool.run(2, places_of_parts, layout) == [[], []]


def descent(kind: str) -> list[float]:
    """Losses of 200 steps of a small regression by AdamW with moments of a kind."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 32, generator=generator)
    wanted = inputs @ torch.randn(32, generator=generator)
    weights = torch.zeros(32, requires_grad=True)
    optimizer = RoundedAdamW([weights], lr=0.03, betas=(0.9, 0.999))
    if kind == "bf16_stochastic":
        optimizer.places = {weights: (TensorPlace(0, 32, 32, 0), 5)}
    optimizer.moment_dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    losses = []
    for step in range(200):
        rows = torch.arange(step * 16, step * 16 + 16) % 256
        loss = (inputs[rows] @ weights - wanted[rows]).square().mean()
        weights.grad = None
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_200_steps_as_with_fp32() -> None:
    expected = descent("fp32")
    assert expected[-1] < 0.1 * expected[0]
    for kind in ("bf16", "bf16_stochastic"):
        losses = descent(kind)
        assert losses != expected
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.05 * expected[0]


@pytest.mark.parametrize("case", [STOCHASTIC, pytest.param(NEAREST, marks=pytest.mark.long)])
def test_layouts_and_fp32(case: Case, pool: RankPool, packs: list[TestPack]) -> None:
    """20 steps on tensor ranks as on one, whose difference is far below that from fp32."""
    (alone,) = pool.run(1, curve, Layout(1, {}, case), packs)
    (wide,) = pool.run(1, curve, Layout(1, {}, replace(case, moments="fp32")), packs)
    rounding = max(abs(a - b) for a, b in zip(alone, wide, strict=True))
    assert 0 < rounding < 0.03
    for losses in pool.run(2, curve, Layout(2, {"tensor": 2}, case), packs):
        assert max(abs(a - b) for a, b in zip(losses, alone, strict=True)) < rounding / 3


def test_checkpoints(pool: RankPool, packs: list[TestPack], tmp_path: Path) -> None:
    """Resumed bit for bit; moments are bf16 on disk, and are read into fp32 and back."""
    layout = layout_of("data 2", STOCHASTIC)
    run, again = tmp_path / "run", tmp_path / "again"
    pool.run(2, save, layout, packs, run)
    expected = pool.run(2, uninterrupted, layout, packs, tmp_path / "file")
    resumed = pool.run(2, bits, layout, packs, run)
    for (theirs,), ours in zip(expected, resumed, strict=True):
        assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []

    wide = layout_of("tensor 2", replace(STOCHASTIC, moments="fp32"))
    pool.run(2, save_again, wide, run, again)
    back = tmp_path / "back"
    pool.run(2, save_again, layout, again, back)
    before, after, narrow = tensors_in(run), tensors_in(again), tensors_in(back)
    moments = [name for name in before if ".exp_avg" in name]
    assert len(moments) > 20
    for name in moments:
        assert before[name].dtype == torch.bfloat16 and after[name].dtype == torch.float32
        assert torch.equal(before[name].float(), after[name])
        assert torch.equal(before[name], narrow[name])


def test_muon_has_none() -> None:
    with pytest.raises(UserError, match=r"optim\.moments=bf16 is for optim=adamw"):
        compose(["+recipe=demo", "optim=muon", "optim.moments=bf16"], 1)
