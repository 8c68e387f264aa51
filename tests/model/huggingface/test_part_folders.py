"""A language model and a vision tower in folders of their own become parts of one model, tensor by tensor.

References: transformers' Qwen3ForCausalLM, Qwen3MoeForCausalLM, Qwen3VLVisionModel, SiglipVisionModel and Siglip2VisionModel, saved
by themselves; SigLIP's hidden states.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import visionloom.model.vision as vision_module
from visionloom.common.errors import UserError
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.names import from_huggingface
from visionloom.model.huggingface.part_folders import language_folder, tower_folder
from visionloom.model.huggingface.shapes import parameter_shapes
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import canonical_parameters, cut, draw_weights
from visionloom.model.trainable import group_of
from visionloom.model.vision import VisionInput
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.topology import Topology
from visionloom.tests.model.huggingface.test_folder import edit_config, model, save
from visionloom.tests.model.reference import reference_model
from visionloom.tests.ranks import RankPool
from visionloom.train.weights.load_huggingface import load_language, load_tower

KINDS = {"dense": model(), "tied": model(tied=True), "mixture": model(experts=8)}


def language_model(config: ModelConfig) -> Any:
    """transformers' language model of these sizes, random; its rotation is slower, as Qwen3's is beside Qwen3-VL's."""
    text = config.text
    sizes: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.ffn_hidden_size,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "head_dim": text.head_dim,
        "tie_word_embeddings": text.tie_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    torch.manual_seed(5)
    if not text.experts:
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **sizes,
            num_experts=text.experts,
            num_experts_per_tok=text.experts_per_token,
            moe_intermediate_size=text.expert_ffn_hidden_size,
            norm_topk_prob=True,
        )
    )


def save_parts(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Write a language model and a tower as transformers does; return our parameters that they hold."""
    language = language_model(config)
    language.save_pretrained(folder / "language", max_shard_size="100KB")
    whole = reference_model(config, 7)
    whole.model.visual.save_pretrained(folder / "vision")

    state = dict(whole.state_dict())
    for name, tensor in language.state_dict().items():
        is_outer = name == "lm_head.weight"
        state[name if is_outer else name.replace("model.", "model.language_model.", 1)] = tensor
    ours = from_huggingface(state, config)
    return {name: full for name, full in ours.items() if group_of(name) != "merger"}


def drawn(config: ModelConfig, topology: Topology) -> Qwen3VL:
    part = Qwen3VL(config, topology, torch.float32)
    draw_weights(part, config, 1, topology)
    return part


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_loaded_bit_for_bit(kind: str, tmp_path: Path, topology: Topology) -> None:
    config = KINDS[kind]
    wanted = save_parts(tmp_path, config)
    part = drawn(config, topology)
    before = {name: tensor.clone() for name, tensor in canonical_parameters(part)}
    load_tower(tmp_path / "vision", [part], config, topology)
    load_language(tmp_path / "language", [part], config, topology)
    after = dict(canonical_parameters(part))
    assert wanted.keys() < after.keys() == parameter_shapes(config).keys()
    for name, tensor in after.items():
        # Mergers stay as they were drawn.
        assert torch.equal(tensor, wanted[name] if name in wanted else before[name]), name


def sums_of_a_rank(folder: Path, config: ModelConfig, wanted: dict[str, Tensor]) -> int:
    """Count the parameters of a tensor rank that are its part of the folders'; on a rank of the pool."""
    from visionloom.parallel import topology as topologies

    topology = topologies.start(ParallelConfig(tensor=2), torch.device("cpu"), 1)
    part = drawn(config, topology)
    load_tower(folder / "vision", [part], config, topology)
    load_language(folder / "language", [part], config, topology)
    return sum(
        torch.equal(parameter, cut(name, wanted[name], parameter, topology))
        for name, parameter in canonical_parameters(part)
        if name in wanted
    )


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_tensor_ranks_hold_their_part(kind: str, tmp_path: Path, pool: RankPool) -> None:
    wanted = save_parts(tmp_path, KINDS[kind])
    counts = pool.run(2, sums_of_a_rank, tmp_path, KINDS[kind], wanted)
    assert counts == [len(wanted)] * 2


def test_a_whole_model_has_both_parts(tmp_path: Path, topology: Topology) -> None:
    config = model()
    state = save(tmp_path, config)
    part = drawn(config, topology)
    before = {name: tensor.clone() for name, tensor in canonical_parameters(part)}
    load_language(tmp_path, [part], config, topology)
    load_tower(tmp_path, [part], config, topology)
    ours = from_huggingface(state, config)
    for name, tensor in canonical_parameters(part):
        wanted = before[name] if group_of(name) == "merger" else ours[name].float()
        assert torch.equal(tensor, wanted), name


def test_missing_and_extra_tensors_are_named(tmp_path: Path, topology: Topology) -> None:
    config = model()
    save_parts(tmp_path, config)
    for part, gone in (("language", "model.norm.weight"), ("vision", "blocks.1.norm1.bias")):
        folder = tmp_path / part
        (path,) = [each for each in folder.glob("*.safetensors") if gone in load_file(each)]
        state = load_file(path)
        state["stranger"] = state.pop(gone)
        save_file(state, path, metadata={"format": "pt"})
        load = load_language if part == "language" else load_tower
        with pytest.raises(UserError) as caught:
            load(folder, [drawn(config, topology)], config, topology)
        message = str(caught.value)
        assert message.startswith(f"init.{part}={folder}: ") and "\n" not in message
        assert f"missing: {gone}; left over: stranger" in message


def test_other_sizes_and_kinds_are_named(tmp_path: Path, topology: Topology) -> None:
    config = model()
    save_parts(tmp_path, config)
    wider = replace(config, text=replace(config.text, heads=8))
    with pytest.raises(UserError, match=r"model\.text\.heads=8, but .* says 4: set it alike"):
        load_language(tmp_path / "language", [], wider, topology)
    deeper = replace(config, vision=replace(config.vision, depth=6))
    with pytest.raises(UserError, match=r"model\.vision\.depth=6, but .* says 5: set it alike"):
        load_tower(tmp_path / "vision", [], deeper, topology)
    with pytest.raises(UserError, match=r"model_type qwen3: give the folder of a vision tower"):
        load_tower(tmp_path / "language", [], config, topology)
    with pytest.raises(UserError, match=r"give the folder of a language model of Qwen3"):
        load_language(tmp_path / "vision", [], config, topology)
    edit_config(tmp_path / "language", sliding_window=4096)
    with pytest.raises(UserError, match=r"not of a language model of Qwen3: sliding_window is"):
        language_folder(tmp_path / "language", "init.language", config)


# ---- SigLIP


def siglip(kind: str, config: ModelConfig, side: int) -> Any:
    """transformers' tower of these sizes with a table of side x side positions."""
    vision = config.vision
    sizes: dict[str, Any] = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.heads,
        "patch_size": vision.patch_size,
        "attn_implementation": "eager",
    }
    torch.manual_seed(3)
    if kind == "siglip":
        size = side * vision.patch_size
        return SiglipVisionModel(SiglipVisionConfig(image_size=size, **sizes)).eval()
    return Siglip2VisionModel(Siglip2VisionConfig(num_patches=side**2, **sizes)).eval()


def features_of_siglip(theirs: Any, picture: Tensor, patch: int) -> Tensor:
    """Features after the last block and before its norm, [N, width] by rows of patches; the picture is [3, S, S]."""
    if isinstance(theirs, SiglipVisionModel):
        inputs = {"pixel_values": picture[None]}
    else:
        side = picture.shape[1] // patch
        squares = picture.unflatten(1, (side, patch)).unflatten(3, (side, patch))
        patches = squares.permute(1, 3, 2, 4, 0).reshape(1, side * side, -1)
        mask = torch.ones(1, side * side, dtype=torch.long)
        shapes = torch.tensor([[side, side]])
        inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    features: Tensor = theirs(**inputs, output_hidden_states=True).hidden_states[-1]
    return features[0]


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_siglip_tower_computes_the_same_without_rotation(
    kind: str, tmp_path: Path, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotations are what Qwen3-VL's tower adds; without them the features of all blocks are SigLIP's."""
    config = model()
    side = config.vision.position_table
    theirs = siglip(kind, config, side)
    theirs.save_pretrained(tmp_path)
    part = drawn(config, topology)
    load_tower(tmp_path, [part], config, topology)

    drawing = torch.Generator().manual_seed(2)
    picture = torch.randint(0, 256, (3, side * 16, side * 16), generator=drawing, dtype=torch.uint8)
    monkeypatch.setattr(vision_module, "vision_rotation", no_rotation)
    with torch.no_grad():
        wanted = features_of_siglip(theirs, picture / 127.5 - 1, 16)
        ours = features_of_ours(part, picture)
    assert (ours - wanted).abs().max() < 1e-5 * wanted.abs().max()


def no_rotation(rows_columns: Tensor, head_dim: int) -> Tensor:
    """Cosines of one and sines of zero."""
    ones = torch.ones(len(rows_columns), head_dim // 2)
    return torch.cat([ones, torch.zeros_like(ones)], dim=1)


def features_of_ours(part: Qwen3VL, picture: Tensor) -> Tensor:
    """The same of our tower [N, width] by rows of patches; the picture is uint8 [3, S, S]."""
    side, tower = picture.shape[1] // 16, part.visual
    squares = picture.unflatten(1, (side // 2, 2, 16)).unflatten(4, (side // 2, 2, 16))
    # Two by two patches together, of each its channels, rows and columns.
    patches = squares.permute(1, 4, 2, 5, 0, 3, 6).reshape(side * side, -1)
    grid = torch.tensor([[1, side, side]])
    inputs = VisionInput.build(patches, grid, part.model_config.vision, torch.device("cpu"))
    features: list[Tensor] = []
    tower.blocks[-1].register_forward_hook(lambda module, given, result: features.append(result))
    tower(inputs)
    by_blocks = features[0].view(side // 2, side // 2, 2, 2, -1)
    return by_blocks.transpose(1, 2).reshape(side * side, -1)


def test_a_table_of_another_size_keeps_its_corners(tmp_path: Path) -> None:
    config = model()
    siglip("siglip", config, 5).save_pretrained(tmp_path)
    source = tower_folder(tmp_path, "init.vision", config)
    (table,) = [t for n, t in load_file(tmp_path / "model.safetensors").items() if "position" in n]
    width, side = config.vision.hidden_size, config.vision.position_table
    resized = source.parameter("visual.pos_embed.weight", [slice(0, side**2), slice(0, width)])
    ours, old = resized.view(side, side, width), table.view(5, 5, width)
    assert ours.shape == (8, 8, width)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert torch.equal(ours[row, column], old[row, column])
    # A point between: rows 0 and 1 of the old table at 4/7.
    expected = old[0, 0] + (old[1, 0] - old[0, 0]) * 4 / 7
    assert torch.allclose(ours[1, 0], expected, atol=1e-6)


def test_a_published_siglip_folder_is_read(tmp_path: Path, topology: Topology) -> None:
    """Names with `vision_model.`, a text model beside it, sizes in vision_config."""
    config = model()
    theirs = siglip("siglip2", config, 8)
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    outer = {f"vision_model.{name}": tensor for name, tensor in tensors.items()}
    outer |= {"text_model.x": torch.ones(1), "logit_scale": torch.ones(1)}
    save_file(outer, tmp_path / "model.safetensors", metadata={"format": "pt"})
    vision = json.loads((tmp_path / "config.json").read_text())
    written = {"model_type": "siglip2", "vision_config": vision, "text_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    part = drawn(config, topology)
    load_tower(tmp_path, [part], config, topology)
    weight = dict(canonical_parameters(part))["visual.blocks.0.attn.qkv.weight"]
    names = [f"encoder.layers.0.self_attn.{letter}_proj.weight" for letter in "qkv"]
    assert torch.equal(weight, torch.cat([tensors[name] for name in names]))
