"""A checkpoint folder into a Hugging Face folder that transformers loads, tensor by tensor.

The ranks share the files between them: no layout is needed, since a checkpoint has none.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.config import CONFIG, EXPORT_DTYPES, read_json, write_config
from visionloom.model.huggingface.folder import INDEX
from visionloom.model.huggingface.names import convert_parameter
from visionloom.model.huggingface.safetensors_writer import DTYPES, write_safetensors
from visionloom.model.huggingface.shapes import Shape, parameter_shapes
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint import read as checkpoint
from visionloom.train.checkpoint.finite import is_finite, refuse_named
from visionloom.train.checkpoint.state_file import model_of
from visionloom.train.checkpoint.stored import StoredWeights
from visionloom.train.exchange.companions import Companions, companions
from visionloom.train.exchange.import_huggingface import start_folder
from visionloom.train.exchange.serving import carry_companions, write_json, write_serving_files


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
    """One of EXPORT_DTYPES; empty: as in the checkpoint."""
    layout: str = ""
    """Of experts: `transformers`, or `hub` as the published models have them; empty: see `expert_layout`."""
    shard_bytes: int = 5_000_000_000
    """Most bytes of one file, unless a single tensor is larger."""


def export_checkpoint(
    folder: Path, out: Path, options: ExportOptions, topology: Topology, say: Callable[[str], None]
) -> None:
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
    run_state = checkpoint.whole(folder, "checkpoint", topology).run_state
    if run_state.lora:
        raise UserError(
            f"checkpoint={folder} holds adapters only: export them with convert.py adapter"
        )
    files = companions(folder, run_state, options.source)
    write_huggingface(
        StoredWeights(folder),
        model_of(run_state),
        out,
        options,
        files,
        topology,
        say,
        f"checkpoint={folder}",
    )


def write_huggingface(
    weights: Parameters,
    config: ModelConfig,
    out: Path,
    options: ExportOptions,
    files: Companions,
    topology: Topology,
    say: Callable[[str], None],
    source: str,
) -> None:
    """Write parameters as a Hugging Face folder; all ranks call it together. See `export_checkpoint`; `source`: for errors."""
    options = replace(options, layout=expert_layout(config, options.layout))
    if config.text.experts and options.layout != "hub" and topology.is_main:
        say(
            "note: experts are laid out as transformers 5 writes them; 4.57 and servers that read the published layout cannot"
        )
    shards = plan_shards(weights, config, options)
    names = [file_name(number, len(shards)) for number in range(len(shards))]
    partial, wrong = start_folder(out, topology), list[str]()
    for number in range(topology.rank, len(shards), topology.world_size):
        wrong += write_shard(
            partial / names[number], shards[number], weights, config, options.layout
        )
        say(f"{names[number]} written, {shards[number].bytes / 2**30:.2f} GiB")
    refuse_named(wrong, source, topology)
    if topology.is_main:
        if len(shards) > 1:
            _write_index(partial / INDEX, dict(zip(names, shards, strict=True)))
        for line in _write_companions(partial, config, shards, files):
            say(f"note: {line}")
        partial.rename(out)
    topology.barrier()


def expert_layout(config: ModelConfig, wanted: str) -> str:
    """How experts are laid out: as wanted, or else as published, which transformers 4.57 and 5 both read, where that is possible.

    transformers 5 tells the layouts apart by shapes, so a model with a square stack cannot be written as published.
    """
    text = config.text
    square = text.experts and text.hidden_size in (
        2 * text.expert_ffn_hidden_size,
        text.expert_ffn_hidden_size,
    )
    if wanted == "hub" and square:
        raise UserError(
            "layout=hub: one of the stacks of experts is square, and transformers would take it for its own layout:"
            " leave layout out"
        )
    return wanted or ("hub" if text.experts and not square else "transformers")


def plan_shards(weights: Parameters, config: ModelConfig, options: ExportOptions) -> list[Shard]:
    """Which parameters go into which file; UserError naming what the weights lack."""
    lacking = [
        n
        for n, shape in parameter_shapes(config).items()
        if (weights.entry(n) or ((), None))[0] != shape
    ]
    if lacking:
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise UserError(
            f"the checkpoint lacks parameters of its model: {', '.join(lacking[:8])}{more}"
        )
    odd = [
        name
        for name in parameter_shapes(config)
        if (weights.entry(name) or ((), None))[1] not in DTYPES.values()
    ]
    if odd:
        raise UserError(
            f"the checkpoint has parameters of a type that weights never have: {', '.join(odd[:8])}"
        )
    shards = [Shard()]
    for name, shape in parameter_shapes(config).items():
        entry = weights.entry(name)
        assert entry is not None
        dtype = getattr(torch, EXPORT_DTYPES[options.dtype]) if options.dtype else entry[1]
        made = convert_parameter(name, torch.empty(shape, device="meta"), config, options.layout)
        size = sum(tensor.numel() for tensor in made.values()) * dtype.itemsize
        if shards[-1].parameters and shards[-1].bytes + size > options.shard_bytes:
            shards.append(Shard())
        shards[-1].parameters.append(name)
        shards[-1].tensors |= {
            theirs: (tuple(tensor.shape), dtype) for theirs, tensor in made.items()
        }
        shards[-1].bytes += size
    return shards


def write_shard(
    path: Path, shard: Shard, weights: Parameters, config: ModelConfig, layout: str
) -> list[str]:
    """Write one file, a parameter at a time, wider types first; returns the tensors with NaN or infinite numbers."""

    def width(name: str) -> int:
        entry = weights.entry(name)
        return -entry[1].itemsize if entry else 0

    names = sorted(shard.parameters, key=width)
    shapes = parameter_shapes(config)
    order = [
        part
        for name in names
        for part in convert_parameter(
            name, torch.empty(shapes[name], device="meta"), config, layout
        )
    ]
    wrong: list[str] = []

    def pieces() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            for part, tensor in convert_parameter(
                name, weights.parameter(name), config, layout
            ).items():
                wrong.extend([] if is_finite(tensor) else [part])
                yield part, tensor

    write_safetensors(path, {part: shard.tensors[part] for part in order}, pieces())
    return wrong


def file_name(number: int, count: int) -> str:
    """Name of one of `count` files, as transformers names them."""
    return (
        "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    )


def _write_index(path: Path, shards: Mapping[str, Shard]) -> None:
    total = sum(shard.bytes for shard in shards.values())
    files = {tensor: name for name, shard in shards.items() for tensor in shard.tensors}
    write_json(path, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})


def _write_companions(
    partial: Path, config: ModelConfig, shards: list[Shard], files: Companions
) -> list[str]:
    """config.json and the files that go along; returns what is to be said of them."""
    tokens = carry_companions(files, partial)
    kept = read_json(partial / CONFIG, "hf") if (partial / CONFIG).is_file() else None
    dtypes = {dtype for shard in shards for _, dtype in shard.tensors.values()}
    widest = str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")
    write_json(partial / CONFIG, write_config(config, widest, tokens.added if tokens else {}, kept))
    return write_serving_files(partial, files, tokens)
