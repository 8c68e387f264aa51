"""Small models with weights drawn by name, and prompts with pictures and videos, for tests of generation."""

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from visionloom.data.encode.encode import EncodedSample
from visionloom.data.shards.sample import Image, Video
from visionloom.model.huggingface.names import to_huggingface
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import (
    IMAGE,
    VIDEO,
    Example,
    huggingface_model,
    make_example,
    reference_model,
    reference_positions,
    tiny_config,
)
from visionloom.tests.train.layouts import weigh
from visionloom.train.generation.config import Budget
from visionloom.train.generation.generator import Answer, Generator
from visionloom.train.generation.sampling import Sampling

PARTS: list[list[Any]] = [
    [5, (4, 6), 9],
    [21],
    [2, (2, 4, 4), 3, (2, 2), 11],
    [1],
    [3, (2, 2), 4, (6, 4), 1, (2, 10), 12],
    [4, (3, 4, 4), 8],
    [40],
    [2, (8, 8), 2],
]
"""Of each prompt: tokens of text, sides of pictures and frames of videos in patches."""
STOP = (10, 70, 78, 83)
SMALL = Budget(pack_tokens=60, cache_tokens=200)
"""Prompts enter in several packs, and places are taken again."""
WIDE = Budget(pack_tokens=4096, cache_tokens=65_536)


@dataclass(frozen=True)
class Layout:
    """A model in a layout."""

    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    experts: int = 0


def examples() -> list[Example]:
    return [make_example(parts, number) for number, parts in enumerate(PARTS)]


@functools.cache
def prompts() -> list[EncodedSample]:
    """The examples as data/ encodes them, with positions from transformers."""
    theirs = reference_model(tiny_config(), 0)
    made = []
    for number, example in enumerate(examples()):
        count = len(example.ids)
        media = [
            Image("a", 1, 1) if kind == IMAGE else Video(("a",), (0.0,), 1, 1)
            for kind in example.kinds
        ]
        width = 1536 if VIDEO in example.kinds else 768
        # A picture's row of both frames holds each value twice.
        patches = example.patches.clone()
        sizes = [t * h * w for t, h, w in example.grids]
        for rows, kind in zip(patches.split(sizes), example.kinds, strict=True):
            if kind == IMAGE:
                frames = rows.view(-1, 3, 2, 256)
                frames[:, :, 1] = frames[:, :, 0]
        example.patches = patches
        rows = patches if width == 1536 else patches.view(-1, 3, 2, 256)[:, :, 0].reshape(-1, 768)
        made.append(
            EncodedSample(
                sample_id=f"prompt {number}",
                dataset="test",
                task=None,
                input_ids=example.ids.numpy().astype(np.int32),
                target_weights=np.zeros(count, np.float32),
                position_ids=reference_positions(theirs, example).numpy().astype(np.int32),
                visual_positions=np.flatnonzero(np.isin(example.ids.numpy(), (IMAGE, VIDEO))),
                grids=np.array(example.grids, np.int32).reshape(-1, 3),
                media=tuple(media),
                answer=None,
                prompt_length=count,
                patches=rows.numpy(),
            )
        )
    return made


def build(layout: Layout) -> tuple[Topology, list[Qwen3VL]]:
    """The parts of this rank; weights are the same in every layout."""
    config = ParallelConfig(**layout.parallel)
    topology = topologies.start(config, torch.device("cpu"))
    parts = [
        Qwen3VL(tiny_config(experts=layout.experts), topology, chunk=n)
        for n in config.chunk_numbers
    ]
    for part in parts:
        weigh(part, topology)
    return topology, parts


def answer(layout: Layout, sampling: Sampling, budget: Budget) -> dict[str, list[Answer]]:
    """All answers to this rank's share of the prompts, by prompt; on each rank of a layout."""
    topology, parts = build(layout)
    generator = Generator(parts, topology, 0, budget)
    share = generator.topology.share
    mine = prompts()[share.data_rank :: share.data_size]
    answers = generator.generate(iter(mine), sampling)
    return dict(zip([prompt.sample_id for prompt in mine], answers, strict=True))


def transformers_model(part: Qwen3VL) -> Any:
    """transformers' model with the weights of a whole one of ours."""
    theirs = huggingface_model(part.model_config)
    theirs.load_state_dict(to_huggingface(part.state_dict(), part.model_config), strict=False)
    return theirs.eval()


def transformers_answer(theirs: Any, prompt: EncodedSample, most: int, **others: Any) -> Any:
    """What transformers' generate returns for one prompt; its own positions, patches as pixels."""
    from visionloom.data.stream.batch import widen

    ids = torch.from_numpy(prompt.input_ids).long()[None]
    assert prompt.patches is not None
    pixels = torch.from_numpy(widen(prompt.patches, 1536)).float() / 127.5 - 1
    grids = torch.from_numpy(prompt.grids).long()
    is_video = torch.tensor([isinstance(media, Video) for media in prompt.media], dtype=torch.bool)
    inputs: dict[str, Any] = {}
    for mine, pixel_name, grid_name in (
        (~is_video, "pixel_values", "image_grid_thw"),
        (is_video, "pixel_values_videos", "video_grid_thw"),
    ):
        if mine.any():
            inputs[pixel_name] = pixels[mine.repeat_interleave(grids.prod(1))]
            inputs[grid_name] = grids[mine]
    image, video = theirs.config.image_token_id, theirs.config.video_token_id
    kinds = (ids == image).int() + 2 * (ids == video).int()
    return theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, do_sample=False,
        max_new_tokens=most, **inputs, **others,
    )  # fmt: skip
