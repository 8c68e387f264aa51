"""A checkpoint folder into a Hugging Face folder that transformers loads, tensor by tensor.

The ranks share the files between them: no layout is needed, since a checkpoint has none.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import torch
import yaml
from torch import Tensor

from visionloom.model.config import ModelConfig, TextConfig, VisionConfig
from visionloom.model.huggingface import convert_parameter
from visionloom.model.huggingface_config import CONFIG, read_json, write_config
from visionloom.model.huggingface_folder import INDEX
from visionloom.model.safetensors_writer import write_safetensors
from visionloom.model.shapes import Shape, parameter_shapes
from visionloom.parallel.errors import UserError
from visionloom.parallel.topology import Topology
from visionloom.train import checkpoint
from visionloom.train.importing import start_folder
from visionloom.train.stored import StoredWeights
from visionloom.train.weights import carry, companions_of

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXPORT_LAYOUTS: Final = ("transformers", "hub")
GENERATION: Final = "generation_config.json"
STOPS: Final = ("<|im_end|>", "<|endoftext|>")
"""Tokens that end an answer; the last also pads."""


class Parameters(Protocol):
    """Full parameters by canonical name, read when asked for."""

    def entry(self, name: str) -> tuple[Shape, torch.dtype] | None:
        """Shape and type; None if it is not there."""

    def parameter(self, name: str) -> Tensor:
        """The full parameter."""


@dataclass
class Shard:
    """One file: our parameters in it, and what transformers calls their parts."""

    parameters: list[str] = field(default_factory=list)
    tensors: dict[str, tuple[Shape, torch.dtype]] = field(default_factory=dict)
    bytes: int = 0


@dataclass(frozen=True)
class ExportOptions:
    """How an exported folder is made."""

    source: Path | None = None
    """Folder whose config.json, tokenizer, chat template and preprocessor files go along; None: what the weights came with."""
    dtype: str = ""
    """One of DTYPES; empty: as in the checkpoint."""
    layout: str = "transformers"
    """Of experts: `transformers`, or `hub` as the published models have them."""
    shard_bytes: int = 5_000_000_000
    """Most bytes of one file, unless a single tensor is larger."""


def export_checkpoint(folder: Path, out: Path, options: ExportOptions, topology: Topology, say: Callable[[str], None]) -> None:
    """Write a checkpoint's weights as a Hugging Face folder; all ranks call it together.

    Args:
        folder: the checkpoint's.
        out: made here; there is none until it is whole.
        options: see ExportOptions.
        topology: of any layout.
        say: is told of each finished file.

    Raises:
        UserError: if the checkpoint is not whole or lacks parameters, or `out` is there already.
    """
    progress = checkpoint.read(folder).progress
    if progress.lora:
        raise UserError(f"checkpoint={folder} holds adapters only: export them with convert.py adapter")
    if fault := checkpoint.verify(folder, topology):
        raise UserError(f"checkpoint={folder} is damaged: {fault}: name another one")
    config = model_of(progress.model)
    write_huggingface(StoredWeights(folder), config, out, options, files_along(folder, options), topology, say)


def model_of(stored: Mapping[str, Any]) -> ModelConfig:
    """The model that a checkpoint's state names."""
    return ModelConfig(stored["name"], text=TextConfig(**stored["text"]), vision=VisionConfig(**stored["vision"]))


def files_along(folder: Path, options: ExportOptions) -> list[Path]:
    """Folders that an export takes its other files from, the first one first: hf=, what the weights came with, the tokenizer."""
    if options.source is not None:
        return [options.source]
    found, parents = companions_of(folder), folder.resolve().parents
    recipe = parents[2] / "config.yaml" if len(parents) > 2 else None
    if recipe is not None and recipe.is_file():
        tokenizer = Path((yaml.safe_load(recipe.read_text()) or {}).get("data", {}).get("tokenizer", ""))
        found += [tokenizer] if tokenizer.is_dir() else []
    return found


def write_huggingface(
    weights: Parameters,
    config: ModelConfig,
    out: Path,
    options: ExportOptions,
    companions: list[Path],
    topology: Topology,
    say: Callable[[str], None],
) -> None:
    """Write parameters as a Hugging Face folder; all ranks call it together. See `export_checkpoint`."""
    text = config.text
    if (
        options.layout == "hub"
        and text.experts
        and text.hidden_size in (2 * text.expert_ffn_hidden_size, text.expert_ffn_hidden_size)
    ):
        raise UserError(
            "layout=hub: one of the stacks of experts is square, and transformers would take it for its own layout:"
            " leave layout out"
        )
    shards = plan_shards(weights, config, options)
    names = [file_name(number, len(shards)) for number in range(len(shards))]
    partial = start_folder(out, topology)
    for number in range(topology.rank, len(shards), topology.world_size):
        write_shard(partial / names[number], shards[number], weights, config, options.layout)
        say(f"{names[number]} written, {shards[number].bytes / 2**30:.2f} GiB")
    topology.barrier()
    if topology.is_main:
        if len(shards) > 1:
            _write_index(partial / INDEX, dict(zip(names, shards, strict=True)))
        _write_companions(partial, config, shards, companions)
        partial.rename(out)
    topology.barrier()


def plan_shards(weights: Parameters, config: ModelConfig, options: ExportOptions) -> list[Shard]:
    """Which parameters go into which file; UserError naming what the weights lack."""
    lacking = [n for n, shape in parameter_shapes(config).items() if (weights.entry(n) or ((), None))[0] != shape]
    if lacking:
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise UserError(f"the checkpoint lacks parameters of its model: {', '.join(lacking[:8])}{more}")
    shards = [Shard()]
    for name, shape in parameter_shapes(config).items():
        entry = weights.entry(name)
        assert entry is not None
        dtype = DTYPES[options.dtype] if options.dtype else entry[1]
        made = convert_parameter(name, torch.empty(shape, device="meta"), config, options.layout)
        size = sum(tensor.numel() for tensor in made.values()) * dtype.itemsize
        if shards[-1].parameters and shards[-1].bytes + size > options.shard_bytes:
            shards.append(Shard())
        shards[-1].parameters.append(name)
        shards[-1].tensors |= {theirs: (tuple(tensor.shape), dtype) for theirs, tensor in made.items()}
        shards[-1].bytes += size
    return shards


def write_shard(path: Path, shard: Shard, weights: Parameters, config: ModelConfig, layout: str) -> None:
    """Write one file, a parameter at a time, wider types first."""

    def width(name: str) -> int:
        entry = weights.entry(name)
        return -entry[1].itemsize if entry else 0

    names = sorted(shard.parameters, key=width)
    shapes = parameter_shapes(config)
    order = [
        part for name in names for part in convert_parameter(name, torch.empty(shapes[name], device="meta"), config, layout)
    ]
    pieces = (piece for name in names for piece in convert_parameter(name, weights.parameter(name), config, layout).items())
    write_safetensors(path, {part: shard.tensors[part] for part in order}, pieces)


def file_name(number: int, count: int) -> str:
    """Name of one of `count` files, as transformers names them."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(path: Path, shards: Mapping[str, Shard]) -> None:
    total = sum(shard.bytes for shard in shards.values())
    files = {tensor: name for name, shard in shards.items() for tensor in shard.tensors}
    _write_json(path, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})


def _write_companions(partial: Path, config: ModelConfig, shards: list[Shard], companions: list[Path]) -> None:
    """config.json, generation_config.json, and what goes along from the first folder that has it."""
    for folder in reversed(companions):
        carry(folder, partial)
    tokens = added_tokens(partial / "tokenizer.json")
    kept = read_json(partial / CONFIG, "hf") if (partial / CONFIG).is_file() else None
    dtypes = {dtype for shard in shards for _, dtype in shard.tensors.values()}
    widest = str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
    _write_json(partial / CONFIG, write_config(config, widest, tokens, kept))
    if not (partial / GENERATION).is_file():
        stops = [tokens[stop] for stop in STOPS if stop in tokens]
        _write_json(partial / GENERATION, {"eos_token_id": stops, "pad_token_id": stops[-1]} if stops else {})


def added_tokens(path: Path) -> dict[str, int]:
    """Ids of a tokenizer's special tokens by their spelling; empty without a tokenizer."""
    if not path.is_file():
        return {}
    found = read_json(path, "hf").get("added_tokens", [])
    return {token["content"]: token["id"] for token in found if isinstance(token, dict)}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
