"""Folders of PEFT: every setting is understood or refused by name, and so is every tensor.

Reference: peft's LoraConfig, its choice of modules, and what it computes with the folder.
"""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.model.huggingface.peft_config import CONFIG, FIELDS, read_adapter_config, targets
from visionloom.model.lora import apply_lora
from visionloom.model.lora_config import LoraConfig
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import (
    build_pair,
    huggingface_model,
    make_example,
    make_pack,
    reference_run,
    tiny_config,
)
from visionloom.tests.model.test_parity import error
from visionloom.train.weights.load_adapter import WEIGHTS, load_adapter

LORA = LoraConfig(rank=8, alpha=12.0, targets=["linear_qkv"])
FIRST = "base_model.model.model.language_model.layers.0.self_attn"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter on queries and values, as peft saves it."""
    made = peft.LoraConfig(
        r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    peft.get_peft_model(huggingface_model(tiny_config()), made).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def loaded(folder: Path, topology: Topology, lora: LoraConfig = LORA) -> Qwen3VL:
    """Our model with new adapters, which took the folder's over."""
    _, ours = build_pair(topology, 0)
    apply_lora([ours], lora, topology, 1)
    load_adapter(folder, [ours], topology)
    return ours


def refusal(folder: Path, topology: Topology) -> str:
    with pytest.raises(UserError) as caught:
        loaded(folder, topology)
    assert "\n" not in str(caught.value) and f"lora.adapter={folder}" in str(caught.value)
    return str(caught.value)


def test_every_field_of_peft_is_looked_at() -> None:
    assert {field.name for field in fields(peft.LoraConfig)} == FIELDS.names
    assert len(FIELDS.names) == len(FIELDS.read) + len(FIELDS.without_effect) + len(FIELDS.only)


def test_what_peft_saves_by_default_is_plain(folder: Path, topology: Topology) -> None:
    loaded(folder, topology)
    for value in (True, False, "gaussian"):
        change(folder, init_lora_weights=value)
        assert read_adapter_config(folder, LORA)["init_lora_weights"] == value


def test_a_switch_without_a_value_is_off(folder: Path, topology: Topology) -> None:
    change(folder, use_dora=None, use_rslora=None, fan_in_fan_out=None, lora_bias=None)
    loaded(folder, topology)


OTHER: dict[str, Any] = {
    "target_modules": "(", "exclude_modules": [1], "target_parameters": "a", "layers_to_transform": "0", "layers_pattern": 3,
    "peft_type": "IA3", "task_type": "SEQ_CLS", "bias": "all", "modules_to_save": ["lm_head"], "init_lora_weights": "pissa_niter_4",
    "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}, "megatron_config": {"a": 1}, "trainable_token_indices": [3],
    "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0}, "corda_config": {"a": 1}, "lora_ga_config": {"a": 1},
    "velora_config": {"a": 1}, "alora_invocation_tokens": [5], "monteclora_config": {"a": 1}, "layer_replication": [[0, 1]],
    "use_bdlora": {"a": 1}, "arrow_config": {"a": 1}, "kasa_config": {"a": 1},
}  # fmt: skip
"""A value that is not understood, of each field that may have few; those that are not here are switches."""


@pytest.mark.parametrize("name", sorted(FIELDS.only))
def test_another_value_is_refused_by_name(name: str, folder: Path) -> None:
    change(folder, **{name: OTHER.get(name, True)})
    with pytest.raises(UserError, match=f"{name} is .*(understood|name their groups)"):
        read_adapter_config(folder, LORA)


@pytest.mark.parametrize(
    "value", ["pissa", "olora", "corda", "loftq", "lora_ga", "eva", "mica", 1, None]
)
def test_factors_that_may_belong_to_other_weights_are_refused(value: Any, folder: Path) -> None:
    change(folder, init_lora_weights=value)
    with pytest.raises(UserError, match="init_lora_weights is"):
        read_adapter_config(folder, LORA)


@pytest.mark.parametrize(
    ("value", "fine"),
    [(None, True), (False, True), ({}, True), (0.5, False), ("x", False), (True, False)],
)
def test_a_field_that_nobody_knows_may_only_be_off(value: Any, fine: bool, folder: Path) -> None:
    change(folder, not_known=value)
    if fine:
        read_adapter_config(folder, LORA)
    else:
        with pytest.raises(UserError, match=f"not_known is {value!r}, which is not understood"):
            read_adapter_config(folder, LORA)


def test_a_pissa_adapter_that_peft_has_converted_is_read(
    topology: Topology, tmp_path: Path
) -> None:
    """PiSSA takes its factors out of the base weights; peft's conversion doubles the rank and fits the weights as they were."""
    examples = [make_example([5, (4, 6), 9], 0)]
    theirs, _ = build_pair(topology, 0)
    made = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"
    )
    tuned = peft.get_peft_model(theirs, made)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "first")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
        expected = torch.cat(reference_run(tuned.get_base_model(), examples)[0])
        tuned.save_pretrained(tmp_path / "pissa")
        assert "init_lora_weights is 'pissa'" in refusal(tmp_path / "pissa", topology)
        tuned.save_pretrained(
            tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first")
        )
        ours = loaded(tmp_path / "plain", topology)
        assert error(ours.logits(ours.prepare(make_pack(theirs, examples))).cpu(), expected) <= 1e-5


NAMES = [
    f"model.{part}.{leaf}"
    for part in (
        "language_model.layers.0",
        "language_model.layers.1",
        "visual.blocks.1",
        "visual.merger",
    )
    for leaf in ("self_attn.q_proj", "mlp.up_proj", "attn.qkv", "mlp.experts.0.up_proj")
]
PATTERNS = [
    "q_proj",
    "up_proj",
    "attn.qkv",
    NAMES[0],
    r".*layers\.1.*",
    r".*\.(q|v)_proj",
    "mlp",
    "",
]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    config=st.fixed_dictionaries({
        "target_modules": st.one_of(st.sampled_from(PATTERNS), st.lists(st.sampled_from(PATTERNS))),
        "exclude_modules": st.one_of(st.none(), st.sampled_from(PATTERNS), st.lists(st.sampled_from(PATTERNS), max_size=2)),
        "layers_to_transform": st.one_of(st.none(), st.integers(0, 1), st.lists(st.integers(0, 2), max_size=2)),
        "layers_pattern": st.sampled_from([None, "", [], "layers", ["blocks", "layers"]]),
    }),
    name=st.sampled_from(NAMES),
)  # fmt: skip
def test_modules_are_chosen_as_by_peft(config: dict[str, Any], name: str) -> None:
    listed = isinstance(config["target_modules"], list)
    config = config if listed else config | {"layers_to_transform": None, "layers_pattern": None}
    theirs = peft.LoraConfig(
        target_modules=["a"]
    )  # its checks of combinations are not what is compared
    for field, value in config.items():
        setattr(theirs, field, value)
    found = check_target_module_exists(theirs, name)
    assert targets(config, name, is_parameter=False) == (
        bool(found) and type(found).__name__ != "_ExcludedModule"
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"exclude_modules": ["v_proj"]},
            "v_proj, which target_modules, exclude_modules and layers_to_transform",
        ),
        ({"layers_to_transform": [0, 1]}, "layers.2.self_attn.q_proj, which target_modules"),
        ({"target_modules": ["v_proj"]}, "layers.0.self_attn.q_proj, which target_modules"),
        ({"target_modules": None}, "layers.0.self_attn.q_proj, which target_modules"),
    ],
)
def test_tensors_that_the_settings_leave_out_are_refused(
    values: dict[str, Any], told: str, folder: Path, topology: Topology
) -> None:
    change(folder, **values)
    assert told in refusal(folder, topology)


def test_settings_that_cover_all_tensors_are_fine(folder: Path, topology: Topology) -> None:
    change(folder, target_modules=r".*\.self_attn\.[qv]_proj", exclude_modules=["visual"])
    loaded(folder, topology)
    change(folder, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1, 2, 3])
    ours = loaded(folder, topology)
    examples = [make_example([9], 0)]
    theirs, _ = build_pair(topology, 0)
    with torch.no_grad():
        expected = reference_run(
            PeftModel.from_pretrained(theirs, folder).get_base_model(), examples
        )[0][0]
        assert error(ours.logits(ours.prepare(make_pack(theirs, examples))).cpu(), expected) <= 1e-5


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda s: s.update({f"{FIRST}.q_proj.lora_magnitude_vector": torch.ones(128)}), "q_proj.lora_magnitude_vector"),
        (lambda s: s.update({f"{FIRST}.q_proj.lora_B.bias": torch.ones(128)}), "q_proj.lora_B.bias"),
        (lambda s: s.update({"base_model.model.lm_head.weight": torch.ones(96, 64)}), "base_model.model.lm_head.weight"),
        (lambda s: s.pop(f"{FIRST}.q_proj.lora_B.weight"), f"{FIRST}.q_proj.lora_A.weight"),
        (lambda s: s.update({f"{FIRST}.q_proj.lora_A.weight": torch.ones(8, 64, dtype=torch.int8)}), "q_proj.lora_A.weight I8"),
        (
            lambda s: s.update({f"{FIRST}.q_proj.lora_A.weight": torch.ones(1, 64), f"{FIRST}.q_proj.lora_B.weight": torch.ones(128, 1)}),
            "layers.0.self_attn.q_proj is of rank 1",
        ),
    ],
)  # fmt: skip
def test_tensors_that_would_not_be_used_are_named(
    edit: Callable[[dict[str, Tensor]], Any], told: str, folder: Path, topology: Topology
) -> None:
    state = load_file(folder / WEIGHTS)
    edit(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    assert told in refusal(folder, topology)


@pytest.mark.parametrize("text", ["[]", "3", "{", ""])
def test_a_file_that_is_no_object_is_refused(text: str, folder: Path, topology: Topology) -> None:
    (folder / CONFIG).write_text(text)
    assert CONFIG in refusal(folder, topology)
    (folder / CONFIG).unlink()
    assert f"no {CONFIG} there" in refusal(folder, topology)


@pytest.mark.parametrize("pattern", ["(a+)+$|(.*)*x", r"(.)\1", "(?=x)y", "(", "(a{1000}){1000}"])
def test_a_pattern_takes_linear_time_or_is_refused(
    pattern: str, folder: Path, topology: Topology
) -> None:
    """The first would keep Python's `re` busy for ages with a name of 60 letters; the others cannot be matched in linear time."""
    change(folder, target_modules=pattern, exclude_modules=None)
    assert "target_modules" in refusal(folder, topology)
    assert not targets({"target_modules": pattern}, "a" * 60 + "!", False)


@pytest.mark.parametrize("layers", ["(a+)+$", "layers|x", ["("]])
def test_lists_of_layers_are_names(layers: Any, folder: Path, topology: Topology) -> None:
    change(folder, layers_pattern=layers)
    assert "layers_pattern" in refusal(folder, topology)


def test_an_adapter_with_numbers_that_are_none_is_named(folder: Path, topology: Topology) -> None:
    state = load_file(folder / WEIGHTS)
    state[f"{FIRST}.q_proj.lora_A.weight"][0, 0] = float("nan")
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    assert (
        "has NaN or infinite numbers in language_model.decoder.layers.0.self_attention.linear_qkv"
        in refusal(folder, topology)
    )


def test_an_adapter_may_not_lead_elsewhere(
    folder: Path, tmp_path: Path, topology: Topology
) -> None:
    (folder / WEIGHTS).rename(tmp_path.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path.parent / "elsewhere")
    assert "is a link out of its folder" in refusal(folder, topology)
