"""Adapters change nothing at first, have peft's gradients, and come back from peft's folders; malformed ones are refused.

Reference: peft on transformers' model, with the same base weights and the same factors.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visionloom.common.errors import UserError
from visionloom.common.settings import check
from visionloom.model.config import GROUPS
from visionloom.model.flops import StepWork, step_flops
from visionloom.model.huggingface.names import to_huggingface
from visionloom.model.huggingface.peft import from_peft, peft_config, to_peft
from visionloom.model.huggingface.peft_config import CONFIG
from visionloom.model.lora import adapted_modules, apply_lora, merge
from visionloom.model.lora_config import LoraConfig, adapted_layers, linear_layers
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import canonical_parameters
from visionloom.model.trainable import is_adapter, set_trainable
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import (
    TestPack,
    build_pair,
    huggingface_model,
    make_example,
    make_pack,
    reference_run,
    tiny_config,
)
from visionloom.tests.model.test_parity import error
from visionloom.train.weights.load_adapter import PICKLE, WEIGHTS, load_adapter

EXAMPLES = [
    make_example(parts, i)
    for i, parts in enumerate([[5, (4, 6), 9], [21], [2, (2, 4, 4), 3, (2, 2), 11]])
]
EVERYWHERE = LoraConfig(rank=8, alpha=12.0, groups=list(GROUPS))
MIXED = LoraConfig(rank=8, alpha=12.0, groups=["language"], full=["vision", "merger"])
"""Adapters of the language model beside a tower and mergers that train themselves: peft's modules_to_save."""
EXPERTS = [0, 4]
KINDS = {
    "dense": (0, EVERYWHERE),
    "mixture": (4, EVERYWHERE),
    "dense, tower and mergers whole": (0, MIXED),
    "mixture, mergers whole": (4, replace(MIXED, full=["merger"])),
}


def adapted_pair(
    topology: Topology, experts: int, lora: LoraConfig, drawn: bool = True
) -> tuple[Any, Qwen3VL, TestPack]:
    """transformers' model, ours with the same weights and adapters (both factors random if `drawn`), and a pack."""
    theirs, ours = build_pair(topology, 0, True, experts)
    pack = make_pack(theirs, EXAMPLES)
    for layer in ours.language_model.decoder.layers:
        if experts:
            layer.mlp.router.coefficient = 0.0
    apply_lora([ours], lora, topology, 1)
    set_trainable(ours, GROUPS, lora.trains)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if drawn and is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif drawn and lora.trains(name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return theirs, ours, pack


def factors(ours: Qwen3VL) -> dict[str, Tensor]:
    """The adapters' factors, and the weights that train with them, on the host."""
    assert ours.lora is not None
    return {
        name: parameter.detach().cpu()
        for name, parameter in canonical_parameters(ours)
        if ours.lora.trains(name)
    }


@torch.no_grad()
def logits_of(ours: Qwen3VL, pack: TestPack) -> Tensor:
    """Logits [T, V] of a pack, on the host."""
    return ours.logits(ours.prepare(pack)).cpu()


def write_folder(folder: Path, ours: Qwen3VL, lora: LoraConfig) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        to_peft(factors(ours), ours.model_config, lora), folder / WEIGHTS, metadata={"format": "pt"}
    )
    (folder / CONFIG).write_text(json.dumps(peft_config(ours.model_config, lora, "")))
    return folder


@pytest.mark.parametrize("experts", EXPERTS)
def test_new_adapters_change_nothing(topology: Topology, experts: int) -> None:
    _, ours, pack = adapted_pair(topology, experts, EVERYWHERE, drawn=False)
    _, plain = build_pair(topology, 0, True, experts)
    assert torch.equal(logits_of(ours, pack), logits_of(plain, pack))
    assert len(list(adapted_modules([ours]))) == len(list(linear_layers(ours.model_config)))
    assert {name for name, p in ours.named_parameters() if not is_adapter(name)} == dict(
        plain.named_parameters()
    ).keys()
    assert all(p.requires_grad == is_adapter(name) for name, p in ours.named_parameters())
    assert all((p != 0).any() == (".lora_A." in name) for name, p in factors(ours).items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_pefts(topology: Topology, kind: str, tmp_path: Path) -> None:
    """The exported folder, loaded by peft on transformers' model: the same logits, loss and gradients of all that trains."""
    experts, lora = KINDS[kind]
    theirs, ours, pack = adapted_pair(topology, experts, lora)
    with torch.no_grad():
        before, _ = reference_run(theirs, EXAMPLES)
    tuned = PeftModel.from_pretrained(theirs, write_folder(tmp_path, ours, lora), is_trainable=True)
    logits, expected = reference_run(tuned.get_base_model(), EXAMPLES)
    expected.backward()
    total, _ = ours(ours.prepare(pack))
    total.backward()
    found = logits_of(ours, pack)
    assert (
        error(found, torch.cat(logits)) <= 1e-5
        and float((torch.cat(before) - found).abs().max()) > 0.1
    )
    assert float(total) == pytest.approx(float(expected), rel=1e-5)
    names = get_peft_model_state_dict(tuned)
    gradients = {
        name.replace(".modules_to_save", "").replace(".default", ""): p.grad
        for name, p in tuned.named_parameters()
        if p.requires_grad
    }
    assert gradients.keys() == names.keys()
    reference = from_peft(
        {name: grad for name, grad in gradients.items() if grad is not None}, ours.model_config
    )
    for name, parameter in canonical_parameters(ours):
        assert (parameter.grad is not None) == lora.trains(name), name
        if lora.trains(name):
            off = error(parameter.grad.cpu(), reference[name])
            assert off <= 1e-5, (name, off)


@pytest.mark.parametrize("experts", EXPERTS)
def test_merged_weights_are_pefts(topology: Topology, experts: int, tmp_path: Path) -> None:
    theirs, ours, _ = adapted_pair(topology, experts, EVERYWHERE)
    folder = write_folder(tmp_path, ours, EVERYWHERE)
    merged = PeftModel.from_pretrained(theirs, folder).merge_and_unload().state_dict()
    merge([ours])
    assert not any(is_adapter(name) for name, _ in ours.named_parameters())
    exported = to_huggingface(dict(canonical_parameters(ours.cpu())), ours.model_config)
    for name, tensor in exported.items():
        assert float((tensor - merged[name]).abs().max()) <= 1e-6, name


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("full", [[], ["merger", "vision"]])
@pytest.mark.parametrize(
    "targets", [["*"], ["linear_qkv", "linear_fc2"], ["*.layers.1.*", "*.layers.3.mlp.*"]]
)
def test_a_folder_comes_back_with_the_same_bits(
    topology: Topology, experts: int, targets: list[str], full: list[str], tmp_path: Path
) -> None:
    lora = replace(EVERYWHERE, targets=targets, groups=["language"], full=full)
    theirs, ours, _ = adapted_pair(topology, experts, lora)
    folder, expected = write_folder(tmp_path, ours, lora), factors(ours)
    loaded = PeftModel.from_pretrained(theirs, folder)
    assert (
        get_peft_model_state_dict(loaded).keys()
        == to_peft(expected, ours.model_config, lora).keys()
    )
    _, other, _ = adapted_pair(topology, experts, lora, drawn=False)
    load_adapter(folder, [other], topology)
    found = factors(other)
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_an_adapter_made_by_peft_is_taken_over(topology: Topology, tmp_path: Path) -> None:
    """Only queries and values, as peft's own defaults have it: what the folder lacks begins new."""
    made = peft.get_peft_model(
        huggingface_model(tiny_config()), peft.LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    lora = replace(EVERYWHERE, targets=["linear_qkv"], groups=["language"])
    theirs, ours, pack = adapted_pair(topology, 0, lora, drawn=False)
    load_adapter(tmp_path, [ours], topology)
    logits, _ = reference_run(
        PeftModel.from_pretrained(theirs, tmp_path).get_base_model(), EXAMPLES
    )
    assert error(logits_of(ours, pack), torch.cat(logits).detach()) <= 1e-5


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


class Bomb:
    """A pickle that would leave a file behind if it were opened."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_a_folder_that_cannot_be_taken_is_refused(topology: Topology, tmp_path: Path) -> None:
    lora = replace(EVERYWHERE, targets=["linear_qkv"], groups=["language"])
    _, ours, _ = adapted_pair(topology, 0, lora)
    folder = write_folder(tmp_path / "good", ours, lora)
    for changes, message in (
        ({"r": 4}, "r is 4, but lora.rank=8"),
        ({"lora_alpha": 3}, "lora_alpha is 3, but lora.alpha=12"),
        ({"use_dora": True}, "use_dora is True, only False is understood"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', only 'LORA'"),
    ):
        write_folder(folder, ours, lora)
        change_config(folder, **changes)
        with pytest.raises(UserError, match=message):
            load_adapter(folder, [ours], topology)
    _, narrow, _ = adapted_pair(topology, 0, replace(lora, targets=["linear_proj"]))
    with pytest.raises(UserError, match=r"has .*linear_qkv.*: widen lora.targets"):
        load_adapter(write_folder(folder, ours, lora), [narrow], topology)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(folder, [ours], topology)


def test_a_pickle_is_refused_without_being_opened(topology: Topology, tmp_path: Path) -> None:
    lora = replace(EVERYWHERE, targets=["linear_qkv"], groups=["language"])
    _, ours, _ = adapted_pair(topology, 0, lora)
    folder = write_folder(tmp_path / "evil", ours, lora)
    (folder / WEIGHTS).unlink()
    torch.save(Bomb(tmp_path / "boom"), folder / PICKLE)
    with pytest.raises(UserError, match="pickle, which is not read"):
        load_adapter(folder, [ours], topology)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("experts", "lora", "trainable"),
    [
        (0, EVERYWHERE, GROUPS),
        (0, replace(EVERYWHERE, groups=["language"]), GROUPS),
        (0, replace(EVERYWHERE, groups=["merger"]), GROUPS),
        (0, EVERYWHERE, ("language",)),
        (0, MIXED, GROUPS),
        (0, MIXED, ("language",)),
        (0, replace(MIXED, full=["merger"]), GROUPS),
        (0, replace(EVERYWHERE, groups=["vision", "language"], targets=["*.3.*"]), GROUPS),
    ],
)
def test_step_flops_equal_torchs_count(
    topology: Topology, experts: int, lora: LoraConfig, trainable: tuple[str, ...]
) -> None:
    """Reference: torch's FlopCounterMode on all matrix products but attention's, which tests/model/test_flops.py explains."""
    _, model, pack = adapted_pair(topology, experts, lora)
    set_trainable(model, trainable, lora.trains)
    patches, tokens = (
        sum(t * h * w for e in EXAMPLES for t, h, w in e.grids),
        sum(len(e.ids) for e in EXAMPLES),
    )
    work = StepWork(tokens, int((pack.loss_weights > 0).sum()), 0, patches, 0)
    inputs = model.prepare(pack)
    with FlopCounterMode(display=False) as counter:
        model(inputs)[0].backward()
    counts = counter.get_flop_counts()["Global"]
    counted = sum(counts.values()) - zero_products(model, len(pack.input_ids))
    assert sum(step_flops(model.model_config, work, set(trainable), lora).values()) == counted


def zero_products(model: Qwen3VL, rows: int) -> int:
    """The operations with zeros: the B of a layer's parts are one matrix with a block for each, forward and two gradients."""
    operations = 0
    for _, module in adapted_modules([model]):
        matrices = [matrix.flatten(0, -2) for matrix in module.adapter.lora_B.values()]
        outputs, rank = sum(len(matrix) for matrix in matrices), matrices[0].shape[1]
        operations += 3 * 2 * rows * outputs * rank * (len(matrices) - 1)
    return operations


def test_dropout_scales_what_it_keeps(topology: Topology) -> None:
    lora = replace(EVERYWHERE, dropout=0.5, groups=["language"], targets=["linear_proj"])
    _, ours, pack = adapted_pair(topology, 0, lora)
    inputs = ours.prepare(pack)
    with torch.no_grad():
        drawn = [ours.logits(inputs) for _ in range(2)]
        ours.eval()
        assert torch.equal(ours.logits(inputs), ours.logits(inputs)) and not torch.equal(*drawn)
        x = torch.ones(1, 10_000, device=topology.device)
        adapter = next(module for _, module in adapted_modules([ours])).adapter.train()
        part = next(iter(adapter.lora_A))
        adapter.lora_A[part] = torch.nn.Parameter(torch.ones_like(x))
        assert float(adapter.down(x, own_mask=True)) == pytest.approx(10_000, rel=0.05)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (LoraConfig(rank=-1), "lora.rank=-1 must be at least 0"),
        (LoraConfig(rank=8, alpha=0.0), "lora.alpha=0 must be above 0"),
        (LoraConfig(rank=8, dropout=1.0), "lora.dropout=1 must be"),
        (LoraConfig(rank=8, groups=["text"]), "lora.groups=text is unknown"),
        (LoraConfig(rank=8, groups=[]), "lora.targets=* matches no linear layer"),
        (LoraConfig(rank=8, targets=["q_proj"]), "lora.targets=q_proj matches no linear layer"),
        (LoraConfig(rank=8, targets=[]), "choose no layer"),
        (LoraConfig(rank=4), "lora.rank=4 must be a multiple of 8 where experts"),
        (
            LoraConfig(rank=8, dropout=0.1),
            "lora.dropout=0.1 does not work with adapters on experts",
        ),
        (LoraConfig(adapter="a"), "lora.adapter=a needs lora.rank"),
        (LoraConfig(full=["merger"]), "lora.full=['merger'] needs lora.rank above 0"),
        (LoraConfig(rank=8, full=["language"]), "lora.full=language is unknown"),
        (
            LoraConfig(rank=8, groups=["merger", "language"], full=["merger"]),
            "lora.full and lora.groups both have merger",
        ),
    ],
)
def test_a_wrong_option_is_one_line(lora: LoraConfig, expected: str) -> None:
    (line,) = check(lora, "lora").lines or lora.layer_problems(tiny_config(experts=4))
    assert line.startswith(expected) or expected in line


def test_targets_choose_by_whole_and_by_last_name() -> None:
    config = tiny_config()
    chosen = [
        layer.name
        for layer in adapted_layers(
            config, LoraConfig(rank=1, targets=["linear_proj", "*.layers.0.mlp.*"])
        )
    ]
    assert len(chosen) == 4 + 2 and not any("visual" in name for name in chosen)
