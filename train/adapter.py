"""Adapters to and from PEFT's folders, and merged into the weights below them.

A folder holds adapter_config.json and adapter_model.safetensors; a pickle (adapter_model.bin) is never opened.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from visionloom.model.config import ModelConfig, TextConfig, VisionConfig
from visionloom.model.lora import low_rank_product
from visionloom.model.lora_config import LinearLayer, LoraConfig, adapted_layers
from visionloom.model.peft import adapter_names, from_peft, peft_config, to_peft
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import canonical_parameters, cut
from visionloom.model.trainable import is_adapter
from visionloom.parallel.errors import UserError
from visionloom.parallel.topology import Topology
from visionloom.train.stored import StoredWeights

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
STATE = "state.json"
UNREAD = {
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "bias": "none",
}
"""Keys of adapter_config.json that change what an adapter is, and the only value of each that is read."""


def describe(checkpoint: Path) -> tuple[ModelConfig, LoraConfig]:
    """The model and adapters of a checkpoint folder of a run with lora; UserError if it has none."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        parts = state["model"]
        model = ModelConfig(parts["name"], parts["backend"], TextConfig(**parts["text"]), VisionConfig(**parts["vision"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"checkpoint={checkpoint} is not a checkpoint ({error}): name checkpoints/<phase>/step-N") from error
    if not state.get("lora"):
        raise UserError(f"checkpoint={checkpoint} holds whole weights, not adapters: name one of a run with lora.rank above 0")
    return model, LoraConfig(**state["lora"])


def export_adapter(checkpoint: Path, out: Path, base: str = "") -> None:
    """Write a checkpoint's adapters as a folder that `peft.PeftModel.from_pretrained` loads on transformers' model.

    Args:
        checkpoint: folder of a run with lora.
        out: new folder.
        base: name or folder of the model that the adapters are for, kept in adapter_config.json.
    """
    model, lora = describe(checkpoint)
    if out.exists():
        raise UserError(f"out={out} is there already: name a new folder or remove it")
    stored = StoredWeights(checkpoint)
    names = [name for layer in adapted_layers(model, lora) for pair in adapter_names(layer).values() for name in pair]
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    state = to_peft({name: stored.parameter(name) for name in names}, model, lora)
    save_file(state, partial / WEIGHTS, metadata={"format": "pt"})
    (partial / CONFIG).write_text(json.dumps(peft_config(model, lora, base), indent=1) + "\n")
    partial.rename(out)


def load_adapter(folder: Path, chunks: list[Qwen3VL], topology: Topology) -> None:
    """Give the adapters of this rank's chunks what a PEFT folder holds; parts that it lacks (say k_proj) begin new.

    Raises:
        UserError: if the folder is no LoRA adapter of this model, has layers that lora.targets leaves out, or another rank or
            alpha than `lora`.
    """
    config, lora = chunks[0].model_config, chunks[0].lora
    assert lora is not None
    try:
        ours = from_peft(_read(folder, lora), config)
    except ValueError as error:
        raise UserError(f"lora.adapter={folder}: {error}") from error
    known = {name for layer in adapted_layers(config, lora) for pair in adapter_names(layer).values() for name in pair}
    if left := sorted(set(ours) - known):
        raise UserError(f"lora.adapter={folder} adapts {left[0]}: widen lora.targets and lora.groups to have it")
    with torch.no_grad():
        for chunk in chunks:
            for name, parameter in canonical_parameters(chunk):
                if is_adapter(name) and name in ours:
                    parameter.copy_(cut(name, ours[name], parameter, topology))


def _read(folder: Path, lora: LoraConfig) -> dict[str, Tensor]:
    """The tensors of a PEFT folder whose configuration `lora` can take over."""
    if not (folder / WEIGHTS).is_file():
        found = f"only {PICKLE}, a pickle, which is not read: save it as safetensors" if (folder / PICKLE).exists() else "none"
        raise ValueError(f"{WEIGHTS} is needed, the folder has {found}")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {config.get('peft_type')}, not LORA")
    odd = [key for key, value in UNREAD.items() if (config.get(key) or value) != value]
    if odd:
        raise ValueError(f"{odd[0]}={config[odd[0]]} is not supported")
    for option, key in (("rank", "r"), ("alpha", "lora_alpha")):
        if config.get(key) != getattr(lora, option):
            raise ValueError(f"{key} is {config.get(key)}, but lora.{option}={getattr(lora, option):g}: set it alike")
    return tensors


class MergedWeights:
    """The parameters of a checkpoint with the adapters of another added: the interface of StoredWeights, one at a time."""

    def __init__(self, base: StoredWeights, adapters: Path) -> None:
        """`adapters`: checkpoint folder of a run with lora on the weights of `base`."""
        self.base, self.adapters = base, StoredWeights(adapters)
        self.model, self.lora = describe(adapters)
        self.layers: dict[str, LinearLayer] = {f"{layer.name}.weight": layer for layer in adapted_layers(self.model, self.lora)}

    def entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and type of a parameter by its canonical name; None if the checkpoint lacks it."""
        return self.base.entry(name)

    def parameter(self, name: str) -> Tensor:
        """A full parameter by its canonical name, in the base's type; added to in fp32."""
        weight = self.base.parameter(name)
        layer = self.layers.get(name)
        if layer is None:
            return weight
        a, b = ([self.adapters.parameter(n) for n in each] for each in zip(*adapter_names(layer).values(), strict=True))
        heads = self.model.text.kv_heads if "q_proj" in layer.parts else 1
        added = low_rank_product(a, b, heads) * self.lora.scaling
        return (weight.float() + added.view(weight.shape)).to(weight.dtype)
