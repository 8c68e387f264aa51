"""Folders with a part of a model alone, as parameters of a Qwen3-VL model: a language model, or a vision tower."""

from pathlib import Path
from types import MappingProxyType

from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.config import CONFIG, read_json
from visionloom.model.huggingface.folder import HuggingFaceFolder
from visionloom.model.huggingface.part_config import (
    is_siglip,
    is_whole,
    read_language_config,
    read_tower_config,
)
from visionloom.model.huggingface.siglip import SiglipFolder


def language_folder(folder: Path, option: str, model: ModelConfig) -> HuggingFaceFolder:
    """Open a folder that has a language model, alone or with a tower.

    Args:
        folder: of the language model.
        option: that names the folder in errors.
        model: the other parts of the model.

    Raises:
        UserError: as HuggingFaceFolder.
    """
    whole = is_whole(read_json(folder / CONFIG, option))
    return (HuggingFaceFolder if whole else LanguageFolder)(folder, option, model)


def tower_folder(folder: Path, option: str, model: ModelConfig) -> HuggingFaceFolder | SiglipFolder:
    """Open a folder that has a vision tower, alone or with a language model; as `language_folder`."""
    # config.json decides: a folder's name says nothing.
    raw = read_json(folder / CONFIG, option)
    if is_siglip(raw):
        return SiglipFolder(folder, option, model)
    return (HuggingFaceFolder if is_whole(raw) else TowerFolder)(folder, option, model)


class LanguageFolder(HuggingFaceFolder):
    """A language model alone, as transformers' Qwen3ForCausalLM and Qwen3MoeForCausalLM are saved."""

    groups = ("language",)
    prefixes = MappingProxyType({"model.language_model.": "model."})

    def _read_config(self, model: ModelConfig) -> ModelConfig:
        return read_language_config(self.folder, self.option, model)


class TowerFolder(HuggingFaceFolder):
    """A vision tower alone, as transformers' Qwen3VLVisionModel is saved; mergers that it has are for another language model."""

    groups = ("vision",)
    prefixes = MappingProxyType({"model.visual.": ""})
    left_alone = ("merger.", "deepstack_merger_list.")

    def _read_config(self, model: ModelConfig) -> ModelConfig:
        return read_tower_config(self.folder, self.option, model)
