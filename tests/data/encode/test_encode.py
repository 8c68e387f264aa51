"""Positions and prompts. Reference: `get_rope_index` of transformers' Qwen3VLModel."""

import random

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from visionloom.data.config import MediaConfig
from visionloom.data.encode.encode import encode, encode_all, extend, prompt_of
from visionloom.data.encode.tokenizer import IMAGE, VIDEO, Tokenizer
from visionloom.data.shards.sample import Element, Image, Message, Sample, Text, Video

RULES = MediaConfig(
    image_min_pixels=1024, image_max_pixels=65_536, video_min_pixels=1024, video_max_pixels=262_144
)


def random_sample(seed: int) -> Sample:
    rng = random.Random(seed)

    def element() -> Element:
        kind = rng.choice("titv")
        if kind == "t":
            return Text("some words " * rng.randint(1, 5))
        width, height = rng.randint(20, 400), rng.randint(20, 400)
        if kind == "i":
            return Image("a.png", width, height)
        frames = rng.randint(2, 7)
        return Video(
            tuple(f"{i}.png" for i in range(frames)),
            tuple(i / 2 for i in range(frames)),
            width,
            height,
        )

    asked = tuple(element() for _ in range(rng.randint(1, 6)))
    said = (Text("An answer."), *(element() for _ in range(rng.randint(0, 2))))
    return Sample(f"random:{seed}", "chat", (Message("user", asked), Message("assistant", said)))


@pytest.fixture(scope="module")
def reference() -> Qwen3VLModel:
    with torch.device("meta"):
        return Qwen3VLModel(
            Qwen3VLConfig(
                text_config={"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 600},
                vision_config={
                    "depth": 1,
                    "hidden_size": 32,
                    "num_heads": 2,
                    "deepstack_visual_indexes": [0],
                },
            )
        )


@pytest.mark.parametrize("seed", range(25))
def test_positions_are_transformers(
    seed: int, tokenizer: Tokenizer, reference: Qwen3VLModel
) -> None:
    sample = random_sample(seed)
    encoded = encode(sample, tokenizer, RULES)
    ids = torch.from_numpy(encoded.input_ids.astype(np.int64))[None]
    types = (ids == tokenizer.special(IMAGE)).int() + 2 * (ids == tokenizer.special(VIDEO)).int()
    films = [isinstance(media, Video) for media in encoded.media]
    grids = torch.from_numpy(encoded.grids.astype(np.int64))
    images, videos = grids[[not film for film in films]], grids[films]
    expected, _ = reference.get_rope_index(
        ids, types, images if len(images) else None, videos if len(videos) else None
    )
    assert encoded.position_ids.dtype == np.int32
    np.testing.assert_array_equal(encoded.position_ids, expected[:, 0])
    np.testing.assert_array_equal(encoded.visual_positions, np.flatnonzero(types[0]))
    assert len(encoded.visual_positions) * 4 == encoded.patch_count


@pytest.mark.parametrize("seed", range(8))
def test_prompt_then_answer_is_the_sample(seed: int, tokenizer: Tokenizer) -> None:
    sample = random_sample(seed)
    text_only = Sample(
        "t", "chat", (sample.messages[0], Message("assistant", (Text("An answer."),)))
    )
    whole = encode(text_only, tokenizer, RULES)
    prompt = prompt_of(whole)
    rest = whole.input_ids[whole.prompt_length :].tolist()
    again = extend(extend(prompt, rest[:2]), rest[2:])
    np.testing.assert_array_equal(again.input_ids, whole.input_ids)
    np.testing.assert_array_equal(again.position_ids, whole.position_ids)
    assert not again.target_weights.any()
    shown = encode(Sample("q", "chat", sample.messages[:1]), tokenizer, RULES)
    cut = prompt_of(
        encode(sample, tokenizer, RULES)
    )  # pictures of the answer are not part of the prompt
    assert cut.media == shown.media == prompt.media
    np.testing.assert_array_equal(cut.grids, shown.grids)


def test_encoding_together_is_encoding_alone(tokenizer: Tokenizer) -> None:
    samples = [random_sample(seed) for seed in range(10)]
    for sample, together in zip(
        samples, encode_all(samples, tokenizer, RULES, ["a"] * 10), strict=True
    ):
        alone = encode(sample, tokenizer, RULES, "a")
        np.testing.assert_array_equal(together.input_ids, alone.input_ids)
        np.testing.assert_array_equal(together.target_weights, alone.target_weights)
