"""Muon: the same updates as torch's, in any layout, from any layout's checkpoint.

References: torch.optim.Muon with AdamW's root mean square on transformers' tensors, torch.optim.AdamW for the rest; and one process.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.optim import _muon

from visionloom.common.errors import UserError
from visionloom.launch.configure import compose
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.names import convert_parameter
from visionloom.model.sharding import canonical_parameters
from visionloom.tests.model.reference import TestPack
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.checkpoint.test_checkpoint import (
    LAYOUTS,
    bits,
    off,
    save,
    save_again,
    tensors_in,
    uninterrupted,
)
from visionloom.tests.train.layouts import Case, Layout, build, curve, packs_of
from visionloom.train.optim.muon import orthogonalize

DENSE = Case(content="images", optimizer="muon")
MIXTURE = replace(DENSE, experts=8)
CURVES, TOLERANCE = 1e-5, 1e-4
STEPS = 3
MORE: dict[str, tuple[int, dict[str, Any]]] = LAYOUTS | {
    "tensor 2 data 2": (4, {"tensor": 2}),
    "tensor 2 context 2": (4, {"tensor": 2, "context": 2}),
    "tensor 2 expert 2": (2, {"tensor": 2, "expert": 2}),
    "tensor 2 expert 2 data 2": (4, {"tensor": 2, "expert": 2}),
    "expert 2 data 2": (4, {"expert": 2}),
    "tensor 2 over experts": (2, {"tensor": 2, "expert_tensor": 1}),
}


def layout_of(name: str, case: Case) -> Layout:
    ranks, parallel = MORE[name]
    return Layout(ranks, parallel, case)


@pytest.fixture(scope="module")
def packs() -> list[TestPack]:
    return packs_of("images")


# ---- against torch


def separate(name: str, full: Tensor, model: ModelConfig) -> dict[str, Tensor]:
    """A parameter as the matrices that transformers' model has: views of it or copies."""
    matrices = convert_parameter(name, full, model, "separate")
    for there in list(matrices):
        if there.endswith("attn.qkv.weight"):  # of the tower, which transformers joins too
            parts = matrices.pop(there).chunk(3)
            matrices |= {f"{there}.{number}": part for number, part in enumerate(parts)}
    return matrices


def is_for_muon(name: str, weight: Tensor) -> bool:
    words = ("embed_tokens", "lm_head", "pos_embed", "patch_embed", "mlp.gate.weight")
    return weight.dim() == 2 and not any(word in name for word in words)


class Reference:
    """torch's own optimizers on the matrices of transformers' model."""

    def __init__(self, weights: dict[str, Tensor], lr: float, decay: float) -> None:
        self.weights = {name: weight.clone() for name, weight in weights.items()}
        matrices = [w for name, w in self.weights.items() if is_for_muon(name, w)]
        others = [w for name, w in self.weights.items() if not is_for_muon(name, w)]
        decayed = [w for w in others if w.dim() > 1]
        vectors = [w for w in others if w.dim() == 1]
        groups = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizers: list[Any] = [
            _muon.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay),
        ]
        assert matrices and decayed and vectors

    def step(self, gradients: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.grad = gradients[name].clone()
        for optimizer in self.optimizers:
            optimizer.step()


def fp32_products() -> Any:
    """Let torch's Newton-Schulz steps be in fp32, so that they can be compared closely: it rounds to bf16 always."""
    names = SimpleNamespace(**vars(torch) | {"bfloat16": torch.float32})
    return patch.object(_muon, "torch", names)


def errors_against_torch(case: Case, mistake: str) -> dict[str, float]:
    """Relative errors of the changes of transformers' matrices after three updates by drawn gradients; on a rank of the pool."""
    stage = build(Layout(1, {}, case), sharded=True, clip=0.0)
    if mistake == "joined":  # fused matrices taken for one
        for inner in stage.engine.optimizer.chained_optimizers:
            wholes = inner.optimizer.wholes
            inner.optimizer.wholes = [
                replace(
                    u,
                    fusion=replace(
                        u.fusion, repeats=1, rows=(u.fusion.repeats * sum(u.fusion.rows),)
                    ),
                )
                for u in wholes
            ]
    (part,) = stage.model_parts
    parameters = dict(canonical_parameters(part))

    def parted(values: dict[str, Tensor]) -> dict[str, Tensor]:
        pieces: dict[str, Tensor] = {}
        for name, value in values.items():
            pieces |= separate(name, value, case.model)
        return pieces

    before = parted({name: parameter.detach().clone() for name, parameter in parameters.items()})
    reference = Reference(before, lr=1e-3, decay=0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for group in (g for o in stage.engine.optimizer.chained_optimizers for g in o.param_groups):
            group["lr"], group["weight_decay"] = 1e-3, 0.05 * group["wd_mult"]
        gradients = {}
        for name, parameter in parameters.items():
            gradients[name] = torch.randn(parameter.shape, generator=generator)
            parameter.main_grad.copy_(gradients[name])  # type: ignore[attr-defined]
        stage.engine.optimizer.prepare_grads()
        stage.engine.update(1.0)
        with fp32_products():
            reference.step(parted(gradients))
    after = parted({name: parameter.detach() for name, parameter in parameters.items()})
    errors = {}
    for name, weight in after.items():
        expected = reference.weights[name] - before[name]
        errors[name] = float((weight - before[name] - expected).norm() / expected.norm())
    return errors


@pytest.mark.parametrize("case", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_updates_are_torchs(case: Case, pool: RankPool) -> None:
    (errors,) = pool.run(1, errors_against_torch, case, "")
    assert len(errors) > 50
    assert max(errors.values()) <= TOLERANCE, max(errors, key=errors.__getitem__)
    # The control: joined matrices taken for one have other updates.
    (errors,) = pool.run(1, errors_against_torch, case, "joined")
    wrong = [name for name, error in errors.items() if error > 100 * TOLERANCE]
    assert any("q_proj" in name for name in wrong) and any("qkv" in name for name in wrong)
    assert any("gate_proj" in name for name in wrong) and not any("down" in name for name in wrong)


def test_singular_values_come_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 8), (3, 8, 24), (1, 16, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator)))
        assert float(values.min()) > 0.3 and float(values.max()) < 1.3
    assert not orthogonalize(torch.zeros(1, 4, 4)).any()


# ---- layouts


@pytest.fixture(scope="module")
def curves(pool: RankPool, packs: list[TestPack]) -> dict[Case, list[float]]:
    made = {}
    for case in (DENSE, MIXTURE):
        (made[case],) = pool.run(1, curve, Layout(1, {}, case), packs)
        assert made[case][-1] < 0.8 * made[case][0]
    return made


def cases() -> Iterator[Any]:
    """Layouts of the dense model and of the mixture; a few are quick."""
    dense = ["tensor 2", "data 2", "pipeline 2", "pipeline 2 virtual 2", "context 2", "tensor 2 data 2",
             "tensor 2 context 2", "tensor 2 pipeline 2"]  # fmt: skip
    experts = ["expert 2", "tensor 2 expert tensor 2", "tensor 2 expert 2",
               "tensor 2 expert 2 data 2", "expert 2 data 2",
               "pipeline 2 expert 2", "tensor 2 over experts"]  # fmt: skip
    quick = {"expert 2"}
    for case, names in ((DENSE, dense), (MIXTURE, experts)):
        for name in names:
            marks = () if name in quick else pytest.mark.long
            yield pytest.param(case, name, marks=marks, id=name)


@pytest.mark.parametrize(("case", "name"), list(cases()))
def test_a_layout_trains_as_one_process(
    case: Case, name: str, pool: RankPool, packs: list[TestPack], curves: dict[Case, list[float]]
) -> None:
    layout = layout_of(name, case)
    for losses in pool.run(layout.ranks, curve, layout, packs):
        assert max(abs(a - b) for a, b in zip(losses, curves[case], strict=True)) <= CURVES


# ---- checkpoints


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        (DENSE, "tensor 2", "data 2"),
        pytest.param(DENSE, "pipeline 2", "one", marks=pytest.mark.long),
        pytest.param(MIXTURE, "expert 2", "tensor 2 expert tensor 2", marks=pytest.mark.long),
    ],
    ids=["tensor to data", "pipeline to one", "expert to tensor"],
)
def test_a_checkpoint_has_no_layout(
    case: Case, before: str, after: str, pool: RankPool, packs: list[TestPack], tmp_path: Path
) -> None:
    """One more step in another layout ends where an uninterrupted run does, and the moments are the same bits."""
    first, second = layout_of(before, case), layout_of(after, case)
    run, again, file = tmp_path / "run", tmp_path / "again", tmp_path / "expected.pt"
    pool.run(first.ranks, save, first, packs, run)
    pool.run(1, uninterrupted, layout_of("one", case), packs, file)
    assert max(pool.run(second.ranks, off, second, packs, run, file)) <= TOLERANCE

    pool.run(second.ranks, save_again, second, run, again)
    ours, theirs = tensors_in(again), tensors_in(run)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    # One moment a matrix, two of what AdamW updates.
    weights = {name for name in theirs if name.startswith("optimizer.state.param.")}
    kinds = {name.split(".")[2] for name in theirs if name.startswith("optimizer.")}
    assert kinds == {"param", "momentum", "exp_avg", "exp_avg_sq"}
    momenta = [name for name in theirs if name.startswith("optimizer.state.momentum.")]
    means = [name for name in theirs if name.startswith("optimizer.state.exp_avg_sq.")]
    assert len(momenta) + len(means) == len(weights) and len(momenta) > 10


@pytest.mark.parametrize(
    ("case", "name"),
    [(DENSE, "tensor 2"), pytest.param(MIXTURE, "expert 2", marks=pytest.mark.long)],
    ids=["dense", "mixture"],
)
def test_the_same_layout_continues_bit_for_bit(
    case: Case, name: str, pool: RankPool, packs: list[TestPack], tmp_path: Path
) -> None:
    layout = layout_of(name, case)
    pool.run(layout.ranks, save, layout, packs, tmp_path / "run")
    expected = pool.run(layout.ranks, uninterrupted, layout, packs, tmp_path / "file")
    resumed = pool.run(layout.ranks, bits, layout, packs, tmp_path / "run")
    for (theirs,), ours in zip(expected, resumed, strict=True):
        assert [
            name for name, weight in theirs.items() if not torch.equal(weight, ours[name])
        ] == []


def test_adapters_are_refused() -> None:
    words = ["+recipe=lora/demo", "optim=muon", "init.huggingface=/hf"]
    with pytest.raises(UserError) as caught:
        compose(words, 1)
    assert any("optim.name=muon is for whole matrices" in line for line in caught.value.lines)


# ---- what others build in the same process


def optimizer_of_megatron(case: Case) -> tuple[str, str]:
    """Classes of the optimizer inside ours, and of the one that Megatron-core builds by itself afterwards; on a rank of the pool."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    stage = build(Layout(1, {}, case), sharded=True)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True)
    theirs = get_megatron_optimizer(settings, stage.engine.parts, use_gloo_process_groups=False)
    inner = (
        optimizer.chained_optimizers[0].optimizer for optimizer in (stage.engine.optimizer, theirs)
    )
    ours, plain = (type(each).__name__ for each in inner)
    return ours, plain


def test_another_optimizer_stays_megatrons(pool: RankPool) -> None:
    ((ours, theirs),) = pool.run(1, optimizer_of_megatron, DENSE)
    assert ours == "MuonAdamW"
    assert theirs == "AdamW"
