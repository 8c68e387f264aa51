"""Tiny random Qwen3-VL models of transformers, the same model of ours, and packs for both."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from visionloom.model.config import ModelConfig, TextConfig, VisionConfig
from visionloom.model.huggingface.config import rotation_keys
from visionloom.model.huggingface.names import from_huggingface
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import cut
from visionloom.parallel.topology import Topology

IMAGE, VIDEO, START, END = 90, 91, 92, 93
SECONDS = (87, 88, 89)
"""Tokens that stand for a timestamp before each frame of a video."""


def tiny_config(tied: bool = True, experts: int = 0) -> ModelConfig:
    """A model with all parts of the real ones: grouped queries, head_dim x heads unlike the hidden size, three levels.

    With `experts`, a token takes two of them.
    """
    text = TextConfig(
        layers=4, hidden_size=64, ffn_hidden_size=96, heads=4, kv_heads=2, head_dim=32, vocab_size=96, rope_theta=10_000.0,
        mrope_section=[6, 5, 5], tie_embeddings=tied, max_positions=4096, experts=experts,
        experts_per_token=2 if experts else 0, expert_ffn_hidden_size=32 if experts else 0,
    )  # fmt: skip
    vision = VisionConfig(
        depth=5,
        hidden_size=48,
        heads=4,
        ffn_hidden_size=80,
        deepstack_layers=[0, 2, 3],
        position_table=8,
    )
    return ModelConfig(name="test", text=text, vision=vision)


def huggingface_model(config: ModelConfig, image: int = IMAGE, video: int = VIDEO) -> Any:
    """transformers' Qwen3VL(Moe)ForConditionalGeneration in fp32, with the ids of its image and video tokens."""
    text, vision = config.text, config.vision
    mixture = dict(
        num_experts=text.experts, num_experts_per_tok=text.experts_per_token, moe_intermediate_size=text.expert_ffn_hidden_size
    )  # fmt: skip
    config_class, model_class = (
        (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)
        if text.experts
        else (Qwen3VLConfig, Qwen3VLForConditionalGeneration)
    )
    built = config_class(
        text_config=dict(
            vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.ffn_hidden_size,
            num_hidden_layers=text.layers, num_attention_heads=text.heads, num_key_value_heads=text.kv_heads,
            head_dim=text.head_dim, max_position_embeddings=text.max_positions, rms_norm_eps=text.norm_epsilon,
            rope_parameters=rotation_keys(text)["rope_parameters"],
            tie_word_embeddings=text.tie_embeddings, **(mixture if text.experts else {}),
        ),
        vision_config=dict(
            depth=vision.depth, hidden_size=vision.hidden_size, num_heads=vision.heads,
            intermediate_size=vision.ffn_hidden_size, num_position_embeddings=vision.position_table**2,
            deepstack_visual_indexes=vision.deepstack_layers, out_hidden_size=text.hidden_size,
        ),
        image_token_id=image, video_token_id=video, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=text.tie_embeddings,
    )  # fmt: skip
    return model_class(built).float()


def reference_model(config: ModelConfig, seed: int) -> Any:
    """transformers' model with random weights, norms and biases included."""
    torch.manual_seed(seed)
    model = huggingface_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(
                centre + torch.randn_like(parameter) * (0.2 if parameter.dim() < 2 else 0.1)
            )
    return model


def load_reference(
    model: nn.Module, state: dict[str, Tensor], config: ModelConfig, topology: Topology
) -> None:
    """Give our model this rank's part of a transformers state dict; every parameter must be named."""
    ours = from_huggingface(state, config)
    named = dict(model.named_parameters())
    assert named.keys() == ours.keys(), named.keys() ^ ours.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(cut(name, ours[name], parameter, topology))


def build_pair(
    topology: Topology, seed: int, tied: bool = True, experts: int = 0
) -> tuple[Any, Qwen3VL]:
    """transformers' model and ours with the same weights."""
    config = tiny_config(tied, experts)
    theirs = reference_model(config, seed)
    ours = Qwen3VL(config, topology).to(topology.device)
    load_reference(ours, theirs.state_dict(), config, topology)
    return theirs, ours


@dataclass
class Example:
    """One sample as both models want it."""

    ids: Tensor
    patches: Tensor
    grids: list[tuple[int, int, int]]
    kinds: list[int]
    supervised: Tensor


def make_example(parts: list[Any], seed: int) -> Example:
    """A sample from text lengths (int), images (h, w) and videos (t, h, w) in patches, with random content."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    grids, kinds = [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, 87, (part,), generator=generator).tolist()
            continue
        grid = part if len(part) == 3 else (1, *part)
        token = VIDEO if len(part) == 3 else IMAGE
        for frame in range(grid[0]):
            ids += (
                ([SECONDS[frame % 3]] if token == VIDEO else [])
                + [START]
                + [token] * (grid[1] * grid[2] // 4)
                + [END]
            )
        grids.append(grid)
        kinds.append(token)
    count = sum(t * h * w for t, h, w in grids)
    patches = torch.randint(0, 256, (count, 1536), generator=generator, dtype=torch.uint8)
    supervised = torch.rand(len(ids), generator=generator) < 0.6
    supervised[0] = False
    return Example(torch.tensor(ids), patches, grids, kinds, supervised)


@dataclass
class TestPack:
    """The model's Pack protocol, built by plain code that shares nothing with data/."""

    __test__ = False
    input_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    patches: Tensor
    grid_thw: Tensor
    encoder_ranks: Tensor
    visual_rows: Tensor
    padding_mask: Tensor
    segment_datasets: Tensor
    dataset_names: tuple[str, ...] = ("test",)
    sample_ids: tuple[str, ...] = ()

    lost: Tensor | None = None
    teacher: Any = None

    @property
    def unreadable(self) -> Tensor:
        return (
            torch.zeros(len(self.cu_seqlens) - 1, dtype=torch.bool)
            if self.lost is None
            else self.lost
        )

    def without(self, segments: Tensor) -> "TestPack":
        silent = torch.repeat_interleave(segments, self.cu_seqlens.diff())
        return replace(self, loss_weights=self.loss_weights.masked_fill(silent, 0.0))

    @property
    def patch_count(self) -> int:
        return int(self.grid_thw.prod(1).sum())

    @property
    def real_tokens(self) -> int:
        return int((~self.padding_mask).sum())

    @property
    def supervised_tokens(self) -> int:
        return int((self.loss_weights > 0).sum())

    def dealt(self, rank: int | None, owners: Tensor) -> "TestPack":
        """The pack as encoder rank `rank` gets it (None: a rank that encodes nothing), with `owners` int32 [n]."""
        counts = self.grid_thw.prod(1)
        mine = torch.repeat_interleave(owners == (-1 if rank is None else rank), counts)
        return replace(self, patches=self.patches[mine], encoder_ranks=owners)


def reference_positions(theirs: Any, example: Example) -> Tensor:
    """MRoPE positions [3, n] from transformers' own get_rope_index."""
    kinds = (example.ids == IMAGE).int() + 2 * (example.ids == VIDEO).int()
    images, videos = (
        [g for g, k in zip(example.grids, example.kinds, strict=True) if k == kind]
        for kind in (IMAGE, VIDEO)
    )
    positions, _ = theirs.model.get_rope_index(
        example.ids[None],
        kinds[None],
        torch.tensor(images) if images else None,
        torch.tensor(videos) if videos else None,
        torch.ones(1, len(example.ids), dtype=torch.long),
    )
    return positions[:, 0]


def make_pack(
    theirs: Any, examples: list[Example], length: int | None = None, multiple: int = 1
) -> TestPack:
    """Examples one after the other, weight 1 / sqrt(n) for a sample with n supervised tokens, padded to `length`.

    Each example is a segment whose length is padded to a multiple of `multiple`.
    """
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("ids", "labels", "weights", "positions", "padding")
    }
    for example in examples:
        following = torch.cat([example.ids[1:], torch.tensor([-100])])
        used = torch.cat([example.supervised[1:], torch.tensor([False])])
        pad = (0, -len(example.ids) % multiple)
        parts["ids"].append(F.pad(example.ids, pad))
        parts["labels"].append(F.pad(torch.where(used, following, -100), pad, value=-100))
        parts["weights"].append(F.pad(used.float() / max(1, int(used.sum())) ** 0.5, pad))
        parts["positions"].append(F.pad(reference_positions(theirs, example), pad))
        parts["padding"].append(
            F.pad(torch.zeros(len(example.ids), dtype=torch.bool), pad, value=True)
        )
    bounds = np.cumsum([0, *(len(ids) for ids in parts["ids"])]).tolist()
    pad = (0, (length or bounds[-1]) - bounds[-1])
    if pad[1]:
        bounds.append(length)
    ids = torch.cat(parts["ids"])
    grids = torch.tensor([g for e in examples for g in e.grids], dtype=torch.int32).reshape(-1, 3)
    return TestPack(
        input_ids=F.pad(ids, pad),
        labels=F.pad(torch.cat(parts["labels"]), pad, value=-100),
        loss_weights=F.pad(torch.cat(parts["weights"]), pad),
        position_ids=F.pad(torch.cat(parts["positions"], 1), pad).int(),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=int(np.diff(bounds).max()),
        patches=torch.cat([e.patches for e in examples]),
        grid_thw=grids,
        encoder_ranks=torch.zeros(len(grids), dtype=torch.int32),
        visual_rows=((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0],
        padding_mask=F.pad(torch.cat(parts["padding"]), pad, value=True),
        segment_datasets=torch.tensor([0] * len(examples) + [-1] * bool(pad[1]), dtype=torch.int32),
        sample_ids=tuple(str(i) for i in range(len(examples))),
    )


def reference_run(theirs: Any, examples: list[Example]) -> tuple[list[Tensor], Tensor]:
    """Logits [n, V] of each example alone, and the weighted loss sum over all, by transformers and torch."""
    logits, total = [], torch.zeros(())
    for example in examples:
        kinds = (example.ids == IMAGE).int() + 2 * (example.ids == VIDEO).int()
        pixels = example.patches.float() / 127.5 - 1
        inputs: dict[str, Any] = {}
        start = 0
        for grid, kind in zip(example.grids, example.kinds, strict=True):
            count = grid[0] * grid[1] * grid[2]
            names = (
                ("pixel_values", "image_grid_thw")
                if kind == IMAGE
                else ("pixel_values_videos", "video_grid_thw")
            )
            for name, item in zip(
                names, (pixels[start : start + count], torch.tensor([grid])), strict=True
            ):
                inputs[name] = torch.cat([inputs[name], item]) if name in inputs else item
            start += count
        output = theirs(
            input_ids=example.ids[None], position_ids=reference_positions(theirs, example)[:, None],
            attention_mask=torch.ones(1, len(example.ids), dtype=torch.long), mm_token_type_ids=kinds[None],
            use_cache=False, **inputs,
        ).logits[0]  # fmt: skip
        logits.append(output)
        used = example.supervised[1:].nonzero()[:, 0]
        losses = F.cross_entropy(output[used], example.ids[used + 1], reduction="none")
        total = total + losses.sum() / max(1, len(used)) ** 0.5
    return logits, total
