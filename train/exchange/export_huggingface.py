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
from visionloom.model.huggingface.names import convert_parameter
from visionloom.model.huggingface.safetensors_writer import DTYPES, write_safetensors
from visionloom.model.huggingface.shapes import Shape, parameter_shapes
from visionloom.model.huggingface.tensor_files import INDEX
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
        """Return shape and type; None if the parameter is missing."""

    def parameter(self, name: str) -> Tensor:
        """Read the full parameter."""


@dataclass(frozen=True)
class DescribedWeights:
    """Parameters to export, with what belongs to them."""

    parameters: Parameters
    model: ModelConfig
    companions: Companions
    """Files that go along."""
    name: str
    """How an error calls them: `checkpoint=DIR`."""


@dataclass
class Shard:
    """One file: our parameters in it, and what transformers calls their parts."""

    parameters: list[str] = field(default_factory=list)
    tensors: dict[str, tuple[Shape, torch.dtype]] = field(default_factory=dict)
    """Shape and type of each part."""
    bytes: int = 0

    def add(
        self,
        name: str,
        made: Mapping[str, Tensor],
        dtype: torch.dtype,
        size: int,
    ) -> None:
        """Add a parameter of `size` bytes, of which the tensors `made` are written."""
        self.parameters.append(name)
        for theirs, tensor in made.items():
            self.tensors[theirs] = (tuple(tensor.shape), dtype)
        self.bytes += size


@dataclass(frozen=True)
class ExportOptions:
    """Options of an exported folder."""

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
        say: receives a line for each finished file.

    Raises:
        UserError: if the checkpoint is not whole or lacks parameters, or `out` is there already.
    """
    run_state = checkpoint.whole(folder, "checkpoint", topology).run_state
    if run_state.lora:
        raise UserError(
            f"checkpoint={folder} holds adapters only: export them with convert.py adapter"
        )
    files = companions(folder, run_state, options.source)
    model = model_of(run_state)
    weights = DescribedWeights(StoredWeights(folder), model, files, f"checkpoint={folder}")
    write_huggingface(weights, out, options, topology, say)


def write_huggingface(
    weights: DescribedWeights,
    out: Path,
    options: ExportOptions,
    topology: Topology,
    say: Callable[[str], None],
) -> None:
    """Write parameters as a Hugging Face folder; all ranks call it together.

    Args and errors are those of `export_checkpoint`.
    """
    config = weights.model
    options = replace(options, layout=expert_layout(config, options.layout))
    if config.text.experts and options.layout != "hub" and topology.is_main:
        say(
            "note: experts are laid out as transformers 5 writes them; 4.57 and servers that read the published layout cannot"
        )
    shards = plan_shards(weights.parameters, config, options)
    names = [file_name(number, len(shards)) for number in range(len(shards))]
    partial = start_folder(out, topology)

    wrong: list[str] = []
    # No two ranks write one file, and a checkpoint can be read by any of them.
    for number in range(topology.rank, len(shards), topology.world_size):
        name, shard = names[number], shards[number]
        wrong += write_shard(partial / name, shard, weights, options.layout)
        say(f"{name} written, {shard.bytes / 2**30:.2f} GiB")
    refuse_named(wrong, weights.name, topology)  # also waits for all ranks' files

    if topology.is_main:
        if len(shards) > 1:
            write_index(partial / INDEX, dict(zip(names, shards, strict=True)))
        for line in write_companions(partial, weights, shards):
            say(f"note: {line}")
        partial.rename(out)
    topology.barrier()


def expert_layout(config: ModelConfig, wanted: str) -> str:
    """Return the layout of experts: `wanted`, or else the published one where that is possible.

    transformers 4.57 and 5 both read the published one. transformers 5 distinguishes the layouts by shapes, so a model with a
    square stack cannot be written as published.

    Raises:
        UserError: if `wanted` is `hub` and a stack is square.
    """
    text = config.text
    # Sizes of a stack: gate and up projections together, and the down projection.
    widths = (2 * text.expert_ffn_hidden_size, text.expert_ffn_hidden_size)
    square = text.experts and text.hidden_size in widths
    if wanted == "hub" and square:
        raise UserError(
            "layout=hub: one of the stacks of experts is square, and transformers would take it for its own layout:"
            " leave layout out"
        )
    if wanted:
        return wanted
    return "hub" if text.experts and not square else "transformers"


def check_parameters(
    weights: Parameters, config: ModelConfig
) -> dict[str, tuple[Shape, torch.dtype]]:
    """Return shape and type of each parameter of a model.

    Raises:
        UserError: naming those that the weights lack, or have in a type that weights never have.
    """
    entries = {}
    lacking, odd = [], []
    for name, shape in parameter_shapes(config).items():
        entry = weights.entry(name)
        if entry is None or entry[0] != shape:
            lacking.append(name)
        elif entry[1] not in DTYPES.values():
            odd.append(name)
        else:
            entries[name] = entry
    if lacking:
        more = f" and {len(lacking) - 8} more" if len(lacking) > 8 else ""
        raise UserError(
            f"the checkpoint lacks parameters of its model: {', '.join(lacking[:8])}{more}"
        )
    if odd:
        raise UserError(
            f"the checkpoint has parameters of a type that weights never have: {', '.join(odd[:8])}"
        )
    return entries


def plan_shards(weights: Parameters, config: ModelConfig, options: ExportOptions) -> list[Shard]:
    """Deal the parameters to files in the model's order; UserError naming what the weights lack."""
    shards = [Shard()]
    for name, shape in parameter_shapes(config).items():
        entry = weights.entry(name)
        assert entry is not None
        dtype = getattr(torch, EXPORT_DTYPES[options.dtype]) if options.dtype else entry[1]
        made = convert_parameter(name, torch.empty(shape, device="meta"), config, options.layout)
        size = sum(tensor.numel() for tensor in made.values()) * dtype.itemsize
        if shards[-1].parameters and shards[-1].bytes + size > options.shard_bytes:
            shards.append(Shard())
        shards[-1].add(name, made, dtype, size)
    return shards


def write_shard(path: Path, shard: Shard, weights: DescribedWeights, layout: str) -> list[str]:
    """Write one file, a parameter at a time; returns the tensors with NaN or infinite numbers."""
    config, source = weights.model, weights.parameters
    shapes = parameter_shapes(config)

    def width(name: str) -> int:
        entry = source.entry(name)
        return -entry[1].itemsize if entry else 0

    # Wider types first: then every tensor begins at a multiple of its type's size.
    names = sorted(shard.parameters, key=width)
    order: list[str] = []
    for name in names:
        whole = torch.empty(shapes[name], device="meta")
        order += convert_parameter(name, whole, config, layout)

    wrong: list[str] = []

    def pieces() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            parts = convert_parameter(name, source.parameter(name), config, layout)
            for part, tensor in parts.items():
                if not is_finite(tensor):
                    wrong.append(part)
                yield part, tensor

    write_safetensors(path, {part: shard.tensors[part] for part in order}, pieces())
    return wrong


def file_name(number: int, count: int) -> str:
    """Return the name of one of `count` files, as transformers names them."""
    if count == 1:
        return "model.safetensors"
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_index(path: Path, shards: Mapping[str, Shard]) -> None:
    """Write which file holds which tensor, as transformers does."""
    total = sum(shard.bytes for shard in shards.values())
    files = {tensor: name for name, shard in shards.items() for tensor in shard.tensors}
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    write_json(path, content)


def write_companions(partial: Path, weights: DescribedWeights, shards: list[Shard]) -> list[str]:
    """Write config.json and the files that go along; returns a line for each thing to know of them."""
    tokens = carry_companions(weights.companions, partial)
    kept = read_json(partial / CONFIG, "hf") if (partial / CONFIG).is_file() else None
    dtypes = {dtype for shard in shards for _, dtype in shard.tensors.values()}
    # transformers loads in the type that config.json names: the widest loses nothing.
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    name = str(widest).removeprefix("torch.")
    added = tokens.added if tokens else {}
    write_json(partial / CONFIG, write_config(weights.model, name, added, kept))
    return write_serving_files(partial, weights.companions, tokens)
