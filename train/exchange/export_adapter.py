"""The adapters of a checkpoint as a folder that peft loads, or merged into the weights below them for transformers."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.config import differences
from visionloom.model.huggingface.folder import HuggingFaceFolder
from visionloom.model.huggingface.peft import (
    adapter_names,
    from_peft,
    peft_config,
    to_peft,
    whole_parameters,
)
from visionloom.model.huggingface.peft_config import CONFIG
from visionloom.model.huggingface.shapes import parameter_shapes
from visionloom.model.lora import low_rank_product
from visionloom.model.lora_config import LinearLayer, LoraConfig, adapted_layers
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint import read as checkpoints
from visionloom.train.checkpoint.finite import require_finite
from visionloom.train.checkpoint.state_file import STATE, lora_of, model_of, read_run_state
from visionloom.train.checkpoint.stored import StoredWeights
from visionloom.train.exchange.companions import companions
from visionloom.train.exchange.export_huggingface import (
    DescribedWeights,
    ExportOptions,
    Parameters,
    write_huggingface,
)
from visionloom.train.exchange.serving import carry_companions, write_serving_files
from visionloom.train.weights.load_adapter import WEIGHTS


def describe(checkpoint: Path, topology: Topology) -> tuple[ModelConfig, LoraConfig]:
    """Return the model and adapters of a checkpoint of a run with lora.

    Raises:
        UserError: if the checkpoint is damaged or has no adapters.
    """
    run_state = checkpoints.whole(checkpoint, "checkpoint", topology).run_state
    if (lora := lora_of(run_state)) is None:
        raise UserError(
            f"checkpoint={checkpoint} holds whole weights, not adapters: name one of a run with lora.rank above 0"
        )
    return model_of(run_state), lora


def export_adapter(
    checkpoint: Path, out: Path, base: str, topology: Topology, say: Callable[[str], None]
) -> None:
    """Write a checkpoint's adapters as a folder that `peft.PeftModel.from_pretrained` loads.

    One rank does it all.

    Args:
        checkpoint: folder of a run with lora.
        out: new folder; tokenizer, chat template and preprocessors of the run go along with the adapters.
        base: name or folder of the model that the adapters are for, kept in adapter_config.json; empty: what the run began with,
            if that is a Hugging Face folder.
        topology: of any layout.
        say: receives a line for each thing to know of the folder.
    """
    model, lora = describe(checkpoint, topology)
    if out.exists():
        raise UserError(f"out={out} is there already: name a new folder or remove it")
    files = companions(checkpoint, read_run_state(checkpoint))
    base = base or files.weights
    stored = StoredWeights(checkpoint)
    names = _check_adapters(checkpoint, stored, model, lora)
    adapters = {name: stored.parameter(name) for name in names}
    state = to_peft(adapters, model, lora)
    require_finite(state.items(), f"checkpoint={checkpoint}", topology)

    # Under another name until it is whole, so that nobody loads half of it.
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / WEIGHTS).write_bytes(save(state, metadata={"format": "pt"}))
    (partial / CONFIG).write_text(json.dumps(peft_config(model, lora, base), indent=1) + "\n")
    tokens = carry_companions(files, partial)

    for line in write_serving_files(partial, files, tokens, with_model=False):
        say(f"note: {line}")
    if not base:
        say(f"note: {CONFIG} names no model that the adapters are for: give it with base=")
    partial.rename(out)


def adapter_rank_dims(model: ModelConfig, lora: LoraConfig) -> Iterator[tuple[str, int]]:
    """Yield the canonical name of each adapter factor, and its dim of the size lora.rank."""
    for layer in adapted_layers(model, lora):
        for a, b in adapter_names(layer).values():
            yield a, -2
            yield b, -1


def _check_adapters(
    checkpoint: Path, stored: StoredWeights, model: ModelConfig, lora: LoraConfig
) -> list[str]:
    """Return the canonical names of the adapters that a checkpoint's state names, and of the weights that train with them.

    Raises:
        UserError: if one is missing or of another shape.
    """
    described = {}
    for name, dim in adapter_rank_dims(model, lora):
        shape, dtype = stored.entry(name) or ((), torch.float32)
        if len(shape) < 2 or shape[dim] != lora.rank or not dtype.is_floating_point:
            raise UserError(
                f"checkpoint={checkpoint} lacks an adapter that its {STATE} names: {name}"
            )
        described[name] = torch.empty(shape, device="meta")

    for name in whole_parameters(model, lora):
        wanted = parameter_shapes(model)[name]
        shape, dtype = stored.entry(name) or ((), torch.float32)
        if shape != wanted or not dtype.is_floating_point:
            raise UserError(
                f"checkpoint={checkpoint} lacks a weight of lora.full that its {STATE} names: {name}"
            )
        described[name] = torch.empty(shape, device="meta")

    # The other dims are known to the conversion: it runs on shapes alone, back and forth.
    try:
        from_peft(to_peft(described, model, lora), model)
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"checkpoint={checkpoint} has adapters of another shape than its {STATE} names: {error}"
        ) from error
    return list(described)


def export_merged(
    checkpoint: Path, weights: Path, out: Path, topology: Topology, say: Callable[[str], None]
) -> None:
    """Write the weights with the adapters added as a Hugging Face folder; all ranks call it together.

    Args:
        checkpoint: folder of a run with lora.
        weights: the checkpoint, or the Hugging Face folder, that the adapters were trained on.
        out: new folder.
        topology: of any layout.
        say: receives a line for each finished file.
    """
    model, lora = describe(checkpoint, topology)
    stored = (weights / STATE).is_file()
    # A Hugging Face folder has no manifest to compare with.
    if stored:
        checkpoints.whole(weights, "weights", topology)
    base: Parameters = StoredWeights(weights) if stored else FolderWeights(weights, model)
    # By shape alone: comparing numbers would take as long as the export.
    for name, shape in parameter_shapes(model).items():
        if (entry := base.entry(name)) is None or entry[0] != shape:
            raise UserError(
                f"weights={weights} is not what the adapters of {checkpoint} were trained on: {name} differs"
            )
    adapters = StoredWeights(checkpoint)
    _check_adapters(checkpoint, adapters, model, lora)
    merged = MergedWeights(base, adapters, model, lora)
    files = companions(checkpoint, read_run_state(checkpoint), weights=weights)
    described = DescribedWeights(
        merged, model, files, f"checkpoint={checkpoint} on weights={weights}"
    )
    write_huggingface(described, out, ExportOptions(), topology, say)


class FolderWeights:
    """Reads the full parameters of a Hugging Face folder."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Open the folder; UserError naming each field in which its model is not `model`."""
        self.source = HuggingFaceFolder(folder, "weights")
        self.shapes = parameter_shapes(model)
        if faults := list(differences(model, self.source.config, folder)):
            raise UserError("; ".join(faults))

    def entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Return shape and type of a parameter by its canonical name."""
        return self.shapes[name], self.source.parameter_dtype(name, self.shapes[name])

    def parameter(self, name: str) -> Tensor:
        """Read a full parameter by its canonical name."""
        return self.source.parameter(name, [slice(0, size) for size in self.shapes[name]])


class MergedWeights:
    """Adds the adapters of one checkpoint to the parameters of another, one at a time; weights of lora.full take their place."""

    def __init__(
        self, base: Parameters, adapters: Parameters, model: ModelConfig, lora: LoraConfig
    ) -> None:
        """Take `adapters` of a run with `lora` on the weights of `base`."""
        self.base, self.adapters, self.model, self.lora = base, adapters, model, lora
        self.whole = set(whole_parameters(model, lora))
        self.layers: dict[str, LinearLayer] = {
            f"{layer.name}.weight": layer for layer in adapted_layers(self.model, self.lora)
        }

    def entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Return shape and type of a parameter by its canonical name; None if it is missing."""
        return self.base.entry(name)

    def parameter(self, name: str) -> Tensor:
        """Return a full parameter by its canonical name, in the base's type.

        The sum is made in fp32: in bf16 most of a small adapter would be rounded away.
        """
        weight = self.base.parameter(name)
        if name in self.whole:
            return self.adapters.parameter(name).to(weight.dtype)
        layer = self.layers.get(name)
        if layer is None:
            return weight
        a, b = [], []
        for a_name, b_name in adapter_names(layer).values():
            a.append(self.adapters.parameter(a_name))
            b.append(self.adapters.parameter(b_name))
        # Queries, keys and values are interleaved by group of heads in one weight.
        heads = self.model.text.kv_heads if "q_proj" in layer.parts else 1
        added = low_rank_product(a, b, heads) * self.lora.scaling
        return (weight.float() + added.view(weight.shape)).to(weight.dtype)
