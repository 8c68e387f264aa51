"""Every field of a config.json is understood or refused: the tables are complete, and what is read means what it means there.

Reference: transformers' configuration classes, and the logits of the models that it builds from the same config.json.
"""

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from visionloom.common.errors import UserError
from visionloom.model.huggingface.config import config_of
from visionloom.model.huggingface.config_keys import EXPERT_FIELDS, FIELDS
from visionloom.model.huggingface.fields import GENERATION
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import (
    END,
    IMAGE,
    START,
    VIDEO,
    make_example,
    make_pack,
    reference_run,
)
from visionloom.tests.model.test_parity import error
from visionloom.train.weights.load_huggingface import load_huggingface

CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
}
ROPE = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]}
TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 512,
    "attention_bias": False,
}  # fmt: skip
MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 2], "out_hidden_size": 32, "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2,
    "spatial_merge_size": 2, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
LAYERS = ["full_attention"] * 3
EVERYWHERE: dict[str, list[Any]] = {
    "architectures": [None, ["Qwen3VLModel"]], "dtype": [None, "float32"], "torch_dtype": ["float32"],
    "output_hidden_states": [True], "return_dict": [False, True], "output_attentions": [False], "chunk_size_feed_forward": [0, 2],
    "is_encoder_decoder": [False, True], "id2label": [{"0": "a"}], "label2id": [{"a": 0}],
    "problem_type": ["regression"], "transformers_version": ["4.57.1"], "temperature": [0.5], "top_k": [3],
    "_name_or_path": ["x"], "layer_norm_eps": [1e-3], "not_known": [None, False, 3, {"a": 1}], "pad_token_id": [None, 5],
    "bos_token_id": [7], "eos_token_id": [7, [7, 8]], "use_cache": [True, False], "tie_encoder_decoder": [False],
}  # fmt: skip
VALUES: dict[str, dict[str, list[Any]]] = {
    "": EVERYWHERE | {
        "tie_word_embeddings": [True, False, None], "quantization_config": [None, {"quant_method": "fp8"}],
        "hidden_size": [32, 64], "auto_map": [None, {"AutoModel": "code.Model"}], "per_layer_config": [{"1": {"hidden_act": "relu"}}],
    },
    "text_config": EVERYWHERE | {
        "vocab_size": [96, 97, 100], "hidden_size": [32, 40, 31, 24], "intermediate_size": [1, 40, 41], "num_hidden_layers": [1, 2, 5],
        "num_attention_heads": [2, 4, 6, 3], "num_key_value_heads": [1, 2, 4, None], "head_dim": [8, 16, 12, 7, None],
        "hidden_act": ["silu", "gelu", "relu", "swish"], "rms_norm_eps": [1e-6, 1e-2, 0.3], "max_position_embeddings": [4, 4096],
        "attention_bias": [False, True], "attention_dropout": [0.0, 0, 0.5], "initializer_range": [0.1],
        "tie_word_embeddings": [True, False, None], "sliding_window": [None, 4], "use_sliding_window": [False, True],
        "max_window_layers": [1], "layer_types": [LAYERS, ["sliding_attention", *LAYERS[1:]], None],
        "rope_theta": [1e4, 10.0, 5e5, None], "partial_rotary_factor": [1.0, 0.5, None], "rope_scaling": [
            None, ROPE, ROPE | {"rope_theta": 77.0}, ROPE | {"rope_type": "linear", "factor": 2.0},
            ROPE | {"rope_type": "yarn", "factor": 2.0}, ROPE | {"rope_type": "dynamic", "factor": 2.0},
        ],
        "rope_parameters": [
            None, ROPE | {"rope_theta": 99.0}, ROPE | {"rope_theta": 1e4, "mrope_section": [4, 0, 0]}, ROPE | {"rope_theta": 1e4, "factor": 2.0},
            ROPE | {"rope_theta": 1e4, "mrope_section": [3, 1, 0]}, ROPE | {"rope_theta": 1e4, "mrope_interleaved": False},
            ROPE | {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, ROPE | {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0},
            {"rope_type": "default", "rope_theta": 1e4}, ROPE | {"rope_theta": 1e4, "mrope_section": [1, 2, 1]},
        ],
        "num_experts": [4, 5, 1, 0], "num_local_experts": [4, 8], "num_experts_per_tok": [1, 2, 4, 5], "moe_intermediate_size": [24, 32, 20],
        "mlp_only_layers": [[], [1], None], "decoder_sparse_step": [1, 2], "norm_topk_prob": [True, False],
        "router_aux_loss_coef": [0.0, 0.1], "output_router_logits": [True, False], "model_type": ["qwen3_vl_text", "qwen3_text"],
    },
    "vision_config": EVERYWHERE | {
        "depth": [3, 4], "hidden_size": [16, 32, 18], "num_heads": [1, 2, 4], "num_attention_heads": [2, 4], "intermediate_size": [24, 7],
        "num_position_embeddings": [16, 25, 1, 15], "deepstack_visual_indexes": [[], [1], [0, 1, 2], [2, 0], [1, 1], [0, 5], [-1], [0, 1.5], None],
        "out_hidden_size": [32, 16], "in_channels": [3, 1, 4], "patch_size": [16, 8, [16, 16]], "temporal_patch_size": [2, 1],
        "spatial_merge_size": [2, 1, 4], "hidden_act": ["gelu_pytorch_tanh", "gelu", "silu"], "initializer_range": [0.5],
        "rope_parameters": [None, {"rope_theta": 1e4, "rope_type": "axial"}, {"rope_theta": 9.0, "rope_type": "axial"}],
        "rope_theta": [1e4, 50.0], "head_dim": [8, 4], "tie_word_embeddings": [True], "model_type": ["qwen3_vl", "siglip"],
    },
}  # fmt: skip
"""Values of every field, usual and unusual ones; ids of the vision tokens belong to the tokenizer and stay."""
CHANGES = [
    (section, name, value)
    for section, names in VALUES.items()
    for name, values in names.items()
    for value in values
]


def raw_config(kind: str, old: bool) -> dict[str, Any]:
    """A small config.json as transformers 5 writes it, or (`old`) as 4.57 did."""
    rope: dict[str, Any] = (
        {"rope_scaling": ROPE, "rope_theta": 1e4}
        if old
        else {"rope_parameters": ROPE | {"rope_theta": 1e4}}
    )
    mixture = MIXTURE if kind == "qwen3_vl_moe" else {}
    if not old and mixture:
        mixture = {
            ("num_local_experts" if key == "num_experts" else key): value
            for key, value in mixture.items()
        }
    return copy.deepcopy({
        "model_type": kind, "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
        "vision_end_token_id": END, "tie_word_embeddings": False, "text_config": TEXT | mixture | rope, "vision_config": VISION,
    })  # fmt: skip


def reference_of(folder: Path, raw: dict[str, Any]) -> Any:
    """The model that transformers builds from a config.json, with drawn weights, saved beside it; None if it cannot be."""
    (folder / "config.json").write_text(json.dumps(raw))
    config_class, model_class = CLASSES[raw["model_type"]]
    try:
        torch.manual_seed(0)
        model = model_class(config_class.from_pretrained(folder)).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(
                    centre + torch.randn_like(parameter) * (0.2 if parameter.dim() < 2 else 0.3)
                )
        model.config.dtype = torch.float32
        model.save_pretrained(folder)
        return model
    except Exception:  # transformers has errors of many kinds for what it cannot build
        return None


def ours_of(folder: Path, raw: dict[str, Any], topology: Topology) -> Qwen3VL | None:
    """Our model of the folder with this config.json; None if it is refused."""
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        config = config_of(raw, folder, "hf")
        if config.kernel_problems(4, ParallelConfig()):
            return None
        ours = Qwen3VL(config, topology).to(topology.device).eval()
        load_huggingface(folder, [ours], config, topology)
        return ours
    except UserError:
        return None


def compare(folder: Path, raw: dict[str, Any], topology: Topology) -> str:
    """`refused`, or `equal` for the file as it is and as transformers writes it; AssertionError if logits differ."""
    try:
        config_of(raw, folder, "hf")
    except UserError as refused:
        assert "\n" not in str(refused) and str(folder) in str(refused)
        return "refused"
    theirs = reference_of(folder, raw)
    if theirs is None:
        return "impossible"
    examples = [make_example([4, (2, 4), 5, (4, 4), 6], 1), make_example([9], 2)]
    try:
        with torch.no_grad():
            expected = torch.cat(reference_run(theirs, examples)[0])
    except Exception:  # as above
        return "impossible"
    told = []
    for each in (raw, json.loads((folder / "config.json").read_text())):
        ours = ours_of(folder, each, topology)
        if ours is not None:
            with torch.no_grad():
                assert (
                    error(ours.logits(ours.prepare(make_pack(theirs, examples))).cpu(), expected)
                    <= 1e-5
                ), (raw, each)
        told.append("refused" if ours is None else "equal")
    return told[0]


def changed(kind: str, old: bool, changes: list[tuple[str, str, Any]]) -> dict[str, Any]:
    raw = raw_config(kind, old)
    for section, name, value in changes:
        (raw[section] if section else raw)[name] = value
    return raw


@settings(
    max_examples=24,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(sorted(CLASSES)), old=st.booleans(),
    changes=st.lists(st.sampled_from(CHANGES), min_size=1, max_size=4, unique_by=lambda change: change[:2]),
)  # fmt: skip
def test_a_config_is_refused_or_means_what_it_means_in_transformers(
    tmp_path_factory: pytest.TempPathFactory,
    topology: Topology,
    kind: str,
    old: bool,
    changes: list[tuple[str, str, Any]],
) -> None:
    compare(tmp_path_factory.mktemp("model"), changed(kind, old, changes), topology)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([], "equal"),
        ([("text_config", "tie_word_embeddings", True), ("", "tie_word_embeddings", True)], "equal"),
        ([("text_config", "rms_norm_eps", 0.3), ("text_config", "head_dim", 16), ("text_config", "rope_scaling", None),
          ("text_config", "rope_parameters", ROPE | {"rope_theta": 1e4, "mrope_section": [4, 2, 2]})], "equal"),
        ([("vision_config", "deepstack_visual_indexes", [])], "equal"),
        ([("vision_config", "deepstack_visual_indexes", [0, 1, 2]), ("vision_config", "num_heads", 1)], "equal"),
        ([("text_config", "num_experts_per_tok", 1)], {"qwen3_vl": "refused", "qwen3_vl_moe": "equal"}),
        ([("", "hidden_size", 32)], "equal"),
        ([("", "hidden_size", 64)], "refused"),
        ([("", "unsloth_version", "2026.4.2"), ("", "unsloth_fixed", True), ("", "model_name", "unsloth/Qwen3-VL-8B-Instruct"),
          ("", "output_router_logits", True), ("", "router_aux_loss_coef", 0.5), ("", "keys_to_ignore_at_inference", ["cache"]),
          ("", "use_cache", False), ("", "pad_token_id", 5), ("text_config", "attention_bias", False)], "equal"),
        ([("vision_config", "deepstack_visual_indexes", [2, 0])], "refused"),
        ([("vision_config", "deepstack_visual_indexes", [1, 1])], "refused"),
        ([("text_config", "hidden_act", "gelu")], "refused"),
        ([("text_config", "mlp_only_layers", [1])], "refused"),
        ([("vision_config", "rope_parameters", {"rope_theta": 9.0, "rope_type": "axial"})], "refused"),
    ],
)  # fmt: skip
def test_usual_values_are_read_and_others_refused(
    tmp_path: Path,
    topology: Topology,
    kind: str,
    changes: list[tuple[str, str, Any]],
    expected: Any,
) -> None:
    told = expected if isinstance(expected, str) else expected[kind]
    for old in (False, True) if told == "refused" or not changes else (kind == "qwen3_vl",):
        assert compare(tmp_path, changed(kind, old, changes), topology) == told


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tables_have_every_field_of_transformers(kind: str) -> None:
    config_class, _ = CLASSES[kind]
    built = config_class()
    for section, config in {
        "": built,
        "text_config": built.text_config,
        "vision_config": built.vision_config,
    }.items():
        known = FIELDS[section].names | (
            EXPERT_FIELDS if section == "text_config" and kind == "qwen3_vl_moe" else frozenset()
        )
        assert {each.name for each in fields(config)} | config.to_dict().keys() <= known, section
    assert set(GenerationConfig._get_default_generation_params()) <= GENERATION


@pytest.mark.parametrize("kind", CLASSES)
def test_the_rotation_may_be_written_for_both_releases_if_it_is_one(
    kind: str, tmp_path: Path
) -> None:
    raw = raw_config(kind, False)
    text = raw["text_config"]
    text |= {"rope_scaling": ROPE, "rope_theta": text["rope_parameters"]["rope_theta"]}
    assert config_of(raw, tmp_path, "hf").text.rope_theta == text["rope_theta"]
    for other in ({"rope_theta": 5e6}, {"rope_scaling": ROPE | {"mrope_section": [8, 0, 0]}}):
        with pytest.raises(
            UserError,
            match=r"text_config says different things: rope_parameters\.(rope_theta|mrope_section)=.*, rope_",
        ):
            config_of({**raw, "text_config": text | other}, tmp_path, "hf")


def test_no_field_is_in_two_places() -> None:
    for known in FIELDS.values():
        assert len(known.names) == len(known.read) + len(known.without_effect) + len(known.only)
