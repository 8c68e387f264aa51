"""Damaged Hugging Face folders and adapters: an error of ours or success, in bounded time and memory (tests/fuzzing.py).

References: folders that transformers and peft saved.
"""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import peft
import pytest
import torch

from visionloom.common.errors import UserError
from visionloom.model.huggingface.config import read_config, read_json, write_config
from visionloom.model.huggingface.folder import HuggingFaceFolder
from visionloom.model.huggingface.peft_config import CONFIG, read_adapter_config, targets
from visionloom.model.huggingface.shapes import parameter_shapes
from visionloom.model.huggingface.tensor_files import INDEX
from visionloom.model.lora import apply_lora
from visionloom.model.lora_config import LoraConfig
from visionloom.parallel.topology import Topology
from visionloom.tests.fuzzing import BYTE_MUTATORS, Mutator, amount, json_edit, mutants, try_reader
from visionloom.tests.model.reference import (
    build_pair,
    huggingface_model,
    reference_model,
    tiny_config,
)
from visionloom.train.weights import load_adapter as adapter
from visionloom.train.weights.load_adapter import WEIGHTS, load_adapter

SEEDS = [pytest.param(1, id="few"), pytest.param(3, id="many", marks=pytest.mark.faults)]
JSON: tuple[Mutator, ...] = (json_edit, json_edit, json_edit, *BYTE_MUTATORS)


def header_edit(random: Random, data: bytes) -> bytes:
    """A safetensors file with an edited header, its length corrected or not."""
    size = int.from_bytes(data[:8], "little")
    if not 8 <= size + 8 <= len(data):
        return random.choice(BYTE_MUTATORS)(random, data)
    header = json_edit(random, data[8 : 8 + size])
    told = len(header) if random.random() < 0.8 else random.choice((0, 1, 10**8, 2**63, 2**64 - 1))
    return told.to_bytes(8, "little") + header + data[8 + size :]


SAFETENSORS: tuple[Mutator, ...] = (header_edit, header_edit, header_edit, *BYTE_MUTATORS)


def fuzz(name: str, path: Path, read: Any, count: int, mutators: tuple[Mutator, ...]) -> None:
    """Put damaged forms of a file into its place and read; the good one is there again at the end."""
    good = path.read_bytes()

    def replaced(data: bytes) -> object:
        path.write_bytes(data)
        return read()

    try_reader(replaced, mutants([good], amount(count), mutators), (UserError,), name)
    path.write_bytes(good)


def read_all(folder: Path) -> None:
    source = HuggingFaceFolder(folder)
    for name, shape in parameter_shapes(source.config).items():
        source.parameter(name, [slice(0, size) for size in shape])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    reference_model(tiny_config(experts=4), 1).to(torch.bfloat16).save_pretrained(
        folder / "shards", max_shard_size="200KB"
    )
    reference_model(tiny_config(), 1).to(torch.bfloat16).save_pretrained(folder / "whole")
    return folder


@pytest.mark.parametrize("times", SEEDS)
def test_configs(times: int, saved: Path, tmp_path: Path) -> None:
    for kind in ("whole", "shards"):
        shutil.copytree(saved / kind, tmp_path / kind)
        fuzz(
            f"config.json {kind}",
            tmp_path / kind / "config.json",
            lambda kind=kind: read_config(tmp_path / kind, "hf"),
            150 * times,
            JSON,
        )


@pytest.mark.parametrize("times", SEEDS)
def test_configs_that_go_along(times: int, saved: Path, tmp_path: Path) -> None:
    """What an export keeps of a config.json that came with the weights."""
    shutil.copytree(saved / "whole", tmp_path / "whole")
    path, model = tmp_path / "whole" / "config.json", read_config(saved / "whole", "hf")
    fuzz(
        "config.json kept",
        path,
        lambda: json.dumps(write_config(model, "bfloat16", {}, read_json(path, "hf"))),
        60 * times,
        JSON,
    )


@pytest.mark.parametrize("times", SEEDS)
def test_folders(times: int, saved: Path, tmp_path: Path) -> None:
    """The index, a file of tensors, and config.json with all tensors read."""
    shards, whole = (shutil.copytree(saved / kind, tmp_path / kind) for kind in ("shards", "whole"))
    fuzz("index", shards / INDEX, lambda: read_all(shards), 40 * times, JSON)
    fuzz("shard", next(shards.glob("*-00001-*")), lambda: read_all(shards), 40 * times, SAFETENSORS)
    fuzz(
        "safetensors", whole / "model.safetensors", lambda: read_all(whole), 60 * times, SAFETENSORS
    )
    fuzz(
        "config.json with tensors", whole / "config.json", lambda: read_all(whole), 40 * times, JSON
    )


@pytest.mark.parametrize("times", SEEDS)
def test_adapters(
    times: int, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        adapter, "require_finite", lambda *_: None
    )  # asks all ranks, which a forked process cannot
    made = peft.LoraConfig(
        r=8, lora_alpha=12, target_modules=r".*\.(q_proj|v_proj)", init_lora_weights=False
    )
    peft.get_peft_model(huggingface_model(tiny_config()), made).save_pretrained(tmp_path)
    lora = LoraConfig(rank=8, alpha=12.0, targets=["linear_qkv"])
    _, ours = build_pair(topology, 0)
    apply_lora([ours], lora, topology, 1)
    config = tmp_path / CONFIG
    config.write_text(
        json.dumps(
            json.loads(config.read_text())
            | {"layers_pattern": ["layers"], "layers_to_transform": [0, 1]}
        )
    )

    def read() -> None:
        found = read_adapter_config(tmp_path, lora)
        for name in ("model.language_model.layers.0.self_attn.q_proj", "lm_head"):
            targets(found, name, False)

    fuzz("adapter_config.json", config, read, 200 * times, JSON)
    fuzz(
        "adapter weights",
        tmp_path / WEIGHTS,
        lambda: load_adapter(tmp_path, [ours], topology),
        60 * times,
        SAFETENSORS,
    )
