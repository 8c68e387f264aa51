"""Folders of Hugging Face models: what is read, what is refused, and what it takes.

References: transformers' own save_pretrained and its models on the meta device; safetensors.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from visionloom.common.errors import UserError
from visionloom.launch.configure import compose
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.config import differences, read_config, write_config
from visionloom.model.huggingface.folder import HuggingFaceFolder
from visionloom.model.huggingface.names import (
    convert_parameter,
    from_huggingface,
    huggingface_shapes,
    to_huggingface,
)
from visionloom.model.huggingface.safetensors_writer import write_safetensors
from visionloom.model.huggingface.shapes import parameter_shapes
from visionloom.model.huggingface.tensor_files import INDEX
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import reference_model, tiny_config
from visionloom.train.exchange.import_huggingface import import_huggingface

MODELS = (
    "qwen3vl_2b",
    "qwen3vl_4b",
    "qwen3vl_8b",
    "qwen3vl_32b",
    "qwen3vl_30b_a3b",
    "qwen3vl_235b_a22b",
)
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
GATE = "model.language_model.layers.0.mlp.gate_proj.weight"


def model(tied: bool = False, experts: int = 0, width: int = 24) -> ModelConfig:
    """The tiny model of the tests, with experts of `width`: hidden size 64."""
    config = tiny_config(tied, experts)
    return replace(
        config, text=replace(config.text, expert_ffn_hidden_size=width if experts else 0)
    )


def save(folder: Path, config: ModelConfig, shard: str = "200KB") -> dict[str, Tensor]:
    """A folder as transformers writes it, in bf16; returns the model's state."""
    theirs = reference_model(config, 1).to(torch.bfloat16)
    theirs.save_pretrained(folder, max_shard_size=shard)
    state: dict[str, Tensor] = theirs.state_dict()
    return state


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Edit the tensors of a folder with one file."""
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, section: str = "", **values: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (raw[section] if section else raw).update(values)
    (folder / "config.json").write_text(json.dumps(raw))


def all_of(folder: HuggingFaceFolder) -> dict[str, Tensor]:
    """Every parameter by our name."""
    shapes = parameter_shapes(folder.config)
    return {
        name: folder.parameter(name, [slice(0, size) for size in shape])
        for name, shape in shapes.items()
    }


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        all_of(HuggingFaceFolder(folder))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_config_of_the_six_models_are_transformers_own(name: str) -> None:
    run = compose(["+recipe=demo", f"model={name}", "parallel=single"], 2)
    assert run is not None
    config = run.model
    mixture = bool(config.text.experts)
    built = (Qwen3VLMoeConfig if mixture else Qwen3VLConfig)(
        **write_config(config, "bfloat16", {}, None)
    )
    with torch.device("meta"):
        theirs = (
            Qwen3VLMoeForConditionalGeneration if mixture else Qwen3VLForConditionalGeneration
        )(built)
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    if config.text.tie_embeddings:
        assert expected.pop(HEAD) == expected[EMBEDDING]
    assert huggingface_shapes(config) == expected


@pytest.mark.parametrize(("tied", "experts"), [(True, 0), (False, 0), (False, 4)])
def test_config_goes_both_ways(tied: bool, experts: int, tmp_path: Path) -> None:
    config = model(tied, experts)
    theirs = reference_model(config, 1)
    theirs.config.save_pretrained(tmp_path)
    found = read_config(tmp_path, "hf")
    assert (found.text, found.vision) == (config.text, config.vision)
    raw = json.loads((tmp_path / "config.json").read_text())
    written = type(theirs.config)(**write_config(config, "float32", {}, raw)).to_dict()
    assert written["text_config"].pop("norm_topk_prob", None) == (
        True if experts else None
    )  # for servers; transformers has no such key
    assert written == theirs.config.to_dict() | {
        "dtype": "float32",
        "architectures": [type(theirs).__name__],
    }


def test_config_of_transformers_4_is_read(tmp_path: Path) -> None:
    """The keys of the published files: rope_scaling and rope_theta side by side, num_experts, torch_dtype."""
    config = model(False, 4)
    reference_model(config, 1).config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    text = raw["text_config"]
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "num_experts": text.pop("num_local_experts"),
    }
    del text["router_aux_loss_coef"]
    (tmp_path / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    found = read_config(tmp_path, "hf")
    assert (found.text, found.vision) == (config.text, config.vision)


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        ("", {"model_type": "llava"}, "model_type llava"),
        ("text_config", {"attention_bias": True}, "text_config.attention_bias is True"),
        ("text_config", {"head_dim": None}, "text_config.head_dim is missing"),
        (
            "text_config",
            {"hidden_size": "64"},
            "text_config.hidden_size is '64', not a whole number",
        ),
        (
            "text_config",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "mrope_section": [6, 5, 5],
                }
            },
            "rope_parameters.factor is None, not a number",
        ),
        ("vision_config", {"num_position_embeddings": 63}, "63 is not a square"),
        ("vision_config", {"out_hidden_size": 32}, "out_hidden_size=32"),
        ("text_config", {"num_key_value_heads": 3}, "heads=4 must be a multiple of kv_heads=3"),
    ],
)
def test_a_config_of_another_kind_is_refused(
    section: str, values: dict[str, Any], told: str, tmp_path: Path
) -> None:
    reference_model(model(), 1).config.save_pretrained(tmp_path)
    edit_config(tmp_path, section, **values)
    assert told in refusal(tmp_path)


def test_a_recipe_of_another_model_is_told_by_its_field(tmp_path: Path) -> None:
    config = model()
    other = replace(config, text=replace(config.text, heads=8, vocab_size=200, max_positions=9))
    assert differences(other, config, tmp_path) == [
        f"model.text.heads=8, but {tmp_path}/config.json says 4: set it alike"
    ]
    smaller = replace(config, text=replace(config.text, vocab_size=50))
    assert [line.split(",")[0] for line in differences(smaller, config, tmp_path)] == [
        "model.text.vocab_size=50"
    ]


SHAPES = [(False, 4, 24), (True, 4, 32), (False, 4, 64)]


@pytest.mark.parametrize(
    ("layout", "tied", "experts", "width"),
    [
        ("transformers", True, 0, 0),
        ("transformers", False, 0, 0),
        *((layout, *shape) for layout in ("transformers", "hub", "separate") for shape in SHAPES),
    ],
)
def test_every_layout_of_experts_is_read(
    layout: str, tied: bool, experts: int, width: int, tmp_path: Path
) -> None:
    """Widths 32 and 64 make one of the two stacks square: the other one tells the layouts apart."""
    config = model(tied, experts, width)
    expected = from_huggingface(save(tmp_path, config), config)
    if layout != "transformers":
        made = [convert_parameter(name, full, config, layout) for name, full in expected.items()]
        for path in tmp_path.glob("*.safetensors*"):
            path.unlink()
        save_file(
            {k: v.clone().contiguous() for part in made for k, v in part.items()},
            tmp_path / "model.safetensors",
        )
    folder = HuggingFaceFolder(tmp_path)
    assert folder.expert_layout == layout
    found = all_of(folder)
    assert found.keys() == expected.keys()
    assert all(
        found[name].dtype == torch.bfloat16 and torch.equal(found[name], expected[name])
        for name in expected
    )


def test_layouts_side_by_side_are_refused(tmp_path: Path) -> None:
    save(tmp_path, model(False, 4), "5GB")
    name = "model.language_model.layers.2.mlp.experts.down_proj"
    change(tmp_path, lambda state: state.update({name: state[name].transpose(1, 2).contiguous()}))
    assert "some experts are laid out as published and some as transformers" in refusal(tmp_path)


def test_missing_left_over_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    save(tmp_path, model(), "5GB")

    def damage(state: dict[str, Tensor]) -> None:
        del state["model.visual.merger.norm.bias"], state[GATE]
        state["model.visual.extra"] = torch.zeros(1)
        state["model.language_model.norm.weight"] = torch.zeros(63)
        state["model.visual.pos_embed.weight"] = torch.zeros(64, 48, dtype=torch.int8)

    change(tmp_path, damage)
    told = refusal(tmp_path)
    assert f"missing: {GATE}, model.visual.merger.norm.bias;" in told
    assert "left over: model.visual.extra;" in told
    assert "of another shape: model.language_model.norm.weight [63] instead of [64];" in told
    assert "of a type that is not read: model.visual.pos_embed.weight I8" in told


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    save(tmp_path, model(), "5GB")
    change(tmp_path, lambda state: [state.pop(name) for name in list(state) if ".blocks." in name])
    assert " and 52 more" in refusal(tmp_path)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    state = save(folder, model(), "5GB")
    (folder / name).write_bytes(pickle.dumps(Malicious(marker)))
    assert torch.equal(HuggingFaceFolder(folder).read(GATE, [slice(0, 96)]), state[GATE])
    (folder / "model.safetensors").unlink()
    assert f"no safetensors files, only {name}: pickles can run code and are not read" in refusal(
        folder
    )
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists(), "the pickle would have run"


def test_a_pickle_named_as_safetensors_is_not_run(tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "ran"
    save(folder, model(), "5GB")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Malicious(marker)))
    assert "model.safetensors cannot be read" in refusal(folder) and not marker.exists()


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "model.bin", 7])
def test_an_index_names_files_of_its_folder_only(file: Any, tmp_path: Path) -> None:
    save(tmp_path, model())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"][GATE] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = (
        f"names {file}, which is not a safetensors file of the folder"
        if isinstance(file, str)
        else f"weight_map.{GATE} should be a valid string, got 7"
    )
    assert expected in refusal(tmp_path)


def test_a_whole_file_counts_before_what_lies_beside_it(tmp_path: Path) -> None:
    """Saved first in shards, then whole into the same folder: transformers leaves the index there, and reads the whole file."""
    save(tmp_path, model())
    assert (tmp_path / "model.safetensors.index.json").is_file()
    newer = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        newer.lm_head.weight.fill_(3)
    newer.save_pretrained(tmp_path)
    save_file({"base_model.x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert (tmp_path / "model.safetensors").is_file() and (
        tmp_path / "model.safetensors.index.json"
    ).is_file()
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16
    ).state_dict()
    ours = HuggingFaceFolder(tmp_path)
    assert set(ours.names) == set(theirs) and torch.equal(
        ours.read(HEAD, [slice(0, 2)]), theirs[HEAD][:2]
    )
    assert theirs[HEAD].eq(3).all()


def test_a_cut_or_lost_file_is_named(tmp_path: Path) -> None:
    save(tmp_path, model())
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    second.write_bytes(second.read_bytes()[:-7])
    assert f"{second.name} cannot be read" in refusal(tmp_path)
    first.unlink()
    assert f"{first.name} cannot be read" in refusal(tmp_path)
    shutil.rmtree(tmp_path)
    assert "no config.json there" in refusal(tmp_path)


def test_rows_that_the_vocabulary_lacks_are_zeros(tmp_path: Path) -> None:
    state = save(tmp_path, model(), "5GB")
    for name in (EMBEDDING, HEAD):
        change(
            tmp_path, lambda found, name=name: found.update({name: found[name][:90].contiguous()})
        )  # type: ignore[misc]
    found = all_of(HuggingFaceFolder(tmp_path))
    for ours, theirs in (("embedding.word_embeddings", EMBEDDING), ("output_layer", HEAD)):
        rows = found[f"language_model.{ours}.weight"]
        assert (
            torch.equal(rows[:90], state[theirs][:90]) and not rows[90:].any() and len(rows) == 96
        )
    beyond = HuggingFaceFolder(tmp_path).parameter(
        "language_model.output_layer.weight", [slice(92, 96), slice(0, 64)]
    )
    assert beyond.shape == (4, 64) and not beyond.any()


def test_rows_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    save(tmp_path, model(), "5GB")
    change(tmp_path, lambda state: state.update({HEAD: torch.cat([state[HEAD]] * 2)}))
    assert f"{HEAD} [192, 64] instead of [96, 64]" in refusal(tmp_path)


def test_a_tied_head_may_lie_beside_its_embedding_if_it_is_equal(tmp_path: Path) -> None:
    state = save(tmp_path, model(tied=True), "5GB")
    change(tmp_path, lambda found: found.update({HEAD: found[EMBEDDING].clone()}))
    assert torch.equal(
        all_of(HuggingFaceFolder(tmp_path))["language_model.embedding.word_embeddings.weight"],
        state[EMBEDDING],
    )
    change(tmp_path, lambda found: found[HEAD][95, 63].add_(1))
    assert f"{HEAD} is not {EMBEDDING}, but config.json has tie_word_embeddings true" in refusal(
        tmp_path
    )


def test_only_the_asked_region_is_read(tmp_path: Path) -> None:
    """A rank's part of a parameter takes no more bytes than it has, and experts come one matrix at a time."""
    config = model(False, 4)
    expected = from_huggingface(save(tmp_path, config), config)
    folder, taken = HuggingFaceFolder(tmp_path), list[int]()
    read = folder.read

    def counted(name: str, region: Any) -> Tensor:
        part = read(name, region)
        taken.append(part.nbytes)
        return part

    folder.read = counted  # type: ignore[method-assign]
    at = "language_model.decoder.layers.1."
    for name, region in {
        f"{at}self_attention.linear_qkv.weight": [slice(128, 256), slice(0, 64)],
        f"{at}self_attention.linear_proj.weight": [slice(0, 64), slice(32, 64)],
        f"{at}mlp.experts.linear_fc1.weight": [
            slice(1, 3),
            slice(0, 2),
            slice(12, 24),
            slice(0, 64),
        ],
        f"{at}mlp.experts.linear_fc2.weight": [slice(2, 4), slice(0, 64), slice(0, 12)],
        "language_model.output_layer.weight": [slice(48, 96), slice(0, 64)],
    }.items():
        taken.clear()
        part = folder.parameter(name, region)
        assert torch.equal(part, expected[name][tuple(region)]), name
        assert sum(taken) == part.nbytes, name
        if "experts" in name:
            assert max(taken) == 12 * 64 * 2


def test_files_written_tensor_by_tensor_are_safetensors(tmp_path: Path) -> None:
    """Reference: the safetensors package."""
    tensors = {
        "wide": torch.randn(5, 3),
        "narrow": torch.randn(7).bfloat16(),
        "turned": torch.randn(3, 5, 2).bfloat16().transpose(1, 2),
        "empty": torch.zeros(0, 4).bfloat16(),
    }
    planned = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", planned, tensors.items())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(
        found[name].dtype == tensors[name].dtype and torch.equal(found[name], tensors[name])
        for name in tensors
    )
    for wrong in (
        list(tensors.items())[:-1],
        [("wide", torch.zeros(3, 5))],
        [("other", tensors["wide"])],
    ):
        with pytest.raises(ValueError, match="planned"):
            write_safetensors(tmp_path / "y.safetensors", planned, wrong)


def test_full_tensors_go_both_ways() -> None:
    for config in (model(True), model(False, 4)):
        state = reference_model(config, 3).state_dict()
        back = to_huggingface(from_huggingface(state, config), config)
        assert state.keys() - back.keys() == ({HEAD} if config.text.tie_embeddings else set())
        assert all(torch.equal(back[name], state[name]) for name in back)


def test_layers_of_different_types_are_read_but_not_imported(
    topology: Topology, tmp_path: Path
) -> None:
    """A checkpoint has a parameter once for all layers, in one type."""
    state = save(tmp_path / "model", model(), "5GB")
    change(tmp_path / "model", lambda found: found.update({GATE: found[GATE].float()}))
    whole = all_of(HuggingFaceFolder(tmp_path / "model"))[
        "language_model.decoder.layers.0.mlp.linear_fc1.weight"
    ]
    assert whole.dtype == torch.float32 and torch.equal(whole[:96], state[GATE].float())
    with pytest.raises(
        UserError,
        match=r"layers differ in type, .*layers.0.mlp.linear_fc1.weight in float32 and .* in bfloat16",
    ):
        import_huggingface(tmp_path / "model", tmp_path / "out", topology, print)
    assert not list(tmp_path.glob("out*"))


def test_weights_that_are_no_numbers_are_named(tmp_path: Path, topology: Topology) -> None:
    """The smallest of all: one NaN in a bias."""
    from visionloom.train.weights.load_huggingface import load_huggingface

    save(tmp_path, model(), "5GB")
    change(
        tmp_path,
        lambda state: state["model.visual.blocks.0.norm1.bias"].__setitem__(3, float("nan")),
    )
    chunks = [Qwen3VL(model(), topology, torch.float32)]
    with pytest.raises(
        UserError, match=r"has NaN or infinite numbers in visual.blocks.0.norm1.bias"
    ):
        load_huggingface(tmp_path, chunks, HuggingFaceFolder(tmp_path).config, topology)


@pytest.mark.parametrize("kind", ["link", "pipe", "header"])
def test_a_file_of_tensors_is_a_file_of_usual_size(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(folder, model(), "5GB")
    path = folder / "model.safetensors"
    if kind == "header":
        with path.open("r+b") as file:
            file.write((90 << 20).to_bytes(8, "little"))
            file.truncate(1 << 30)
        assert f"its header has {90 << 20} bytes" in refusal(folder)
        return
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere") if kind == "link" else os.mkfifo(path)
    assert re.search(
        "model.safetensors cannot be read: is a (link out of its folder|pipe)|no safetensors",
        refusal(folder),
    )


@pytest.mark.parametrize(
    ("part", "values", "told"),
    [
        ("", {"model_type": ["qwen3_vl"]}, "model_type ['qwen3_vl']"),
        ("", {"model_type": "\x1b[2J"}, "model_type \\x1b[2J"),
        ("", {"text_config": [3]}, "text_config.num_hidden_layers is missing"),
        ("text_config", {"num_hidden_layers": 10**400}, "num_hidden_layers is 1000"),
        ("text_config", {"rope_theta": 10**400}, "rope_theta"),
        ("text_config", {"rope_parameters": {"rope_theta": "x", "mrope_section": 3}}, "mrope_section"),
        ("text_config", {"rope_scaling": "linear"}, "must be objects"),
        ("vision_config", {"num_position_embeddings": [4]}, "num_position_embeddings is [4]"),
        ("vision_config", {"out_hidden_size": {"\x1b": 1}}, "out_hidden_size={'\\x1b': 1}"),
    ],
)  # fmt: skip
def test_a_config_of_another_form_is_one_line(
    part: str, values: dict[str, Any], told: str, tmp_path: Path
) -> None:
    save(tmp_path, model(), "5GB")
    config = json.loads((tmp_path / "config.json").read_text())
    (config[part] if part else config).update(values)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert told in refusal(tmp_path) and "\x1b" not in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("config.json", "config.json cannot be read: is a pipe"),
        (INDEX, f"6 safetensors files and no {INDEX}"),
    ],
)
def test_a_json_file_that_is_a_pipe_is_not_waited_for(name: str, told: str, tmp_path: Path) -> None:
    save(tmp_path, model())
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert told in refusal(tmp_path)


def test_a_snapshot_of_the_hub_is_read(tmp_path: Path) -> None:
    """All its files are links to the repository's blobs, as huggingface_hub makes them."""
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "0123",
        tmp_path / "models--a--b" / "blobs",
    )
    state = save(snapshot, model())
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert torch.equal(HuggingFaceFolder(snapshot).read(GATE, [slice(0, 96)]), state[GATE])
