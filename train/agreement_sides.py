"""The sides that must agree before anything is trained or converted: model, tokenizer, folder and checkpoint. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.common.places import PlaceError, locate, read_located
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.config import CONFIG, read_json
from visionloom.train.checkpoint.state_file import STATE, model_of, read_run_state
from visionloom.train.config import InitConfig, RunConfig
from visionloom.train.exchange.companions import companions_of, tokenizer_of
from visionloom.train.exchange.token_table import TOKENIZER, TokenTable

LATEST: Final = "checkpoints/latest"
LONGEST_POINTER: Final = 4096
"""Bytes of `latest`, which holds a path."""


@dataclass(frozen=True)
class Sides:
    """The sides that are compared; one that is None is not compared."""

    model: ModelConfig
    vocabulary: str
    """How a message calls the model's rows: `model.text.vocab_size=512`."""
    tokens: TokenTable | None = None
    """The tokenizer that is used."""
    option: str = ""
    """The option that names `folder`, or the checkpoint that the folder belongs to."""
    folder: Path | None = None
    """A Hugging Face folder, or the companions of a checkpoint."""
    checkpoint: Path | None = None
    """A checkpoint whose weights are used."""
    resuming: bool = False
    """`checkpoint` is of this run, and data.on_change lets it continue with another tokenizer."""
    recipe: bool = True
    """`model` is a recipe's, which the weights must have been made for."""
    adapters: bool = False
    """Only adapters train."""

    @classmethod
    def of_run(cls, config: RunConfig, resuming: bool) -> "Sides":
        """Return the model and the tokenizer of a run, without weights."""
        return cls(
            config.model,
            f"model.text.vocab_size={config.model.text.vocab_size}",
            TokenTable.read(Path(config.data.tokenizer), "data.tokenizer"),
            adapters=config.lora.rank > 0,
            resuming=resuming,
        )

    @classmethod
    def of_export(cls, checkpoint: Path, source: Path | None, option: str) -> "Sides":
        """Return the sides of an export; the arguments are those of `check_export`."""
        run_state = read_run_state(checkpoint)
        model = model_of(run_state)
        vocabulary = f"{checkpoint} with model.text.vocab_size={model.text.vocab_size}"
        folder = companions_folder(source) if source is not None else None

        tokens = None
        if folder is not None and (folder / TOKENIZER).is_file():
            tokens = TokenTable.read(folder, option)
        elif (trained := tokenizer_of(checkpoint, run_state)) is not None:
            tokens = TokenTable.read(trained, option if trained == folder else "tokenizer")
        return cls(model, vocabulary, tokens, option, folder, checkpoint, recipe=False)

    def where(self, name: str) -> str:
        """Return how a message calls a file of the folder."""
        return f"{self.folder}/{name}"

    def read(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the folder; empty if it is not there."""
        if self.folder is None or not (self.folder / name).is_file():
            return {}
        return read_json(self.folder / name, self.option)

    @property
    def text(self) -> dict[str, Any]:
        """Return text_config of the folder's config.json."""
        return section_of(self.read(CONFIG), "text_config")


def sides_with(base: Sides, option: str, place: Path) -> Sides:
    """Return the same sides with a Hugging Face folder or a checkpoint as that of the weights."""
    if not (place / STATE).is_file():
        return replace(base, option=option, folder=place, checkpoint=None)
    return replace(base, option=option, folder=companions_folder(place), checkpoint=place)


def companions_folder(place: Path) -> Path | None:
    """Return the first folder with the companions of a folder or checkpoint; None if there is none."""
    return next(iter(companions_of(place)), None)


def with_first_weights(base: Sides, init: InitConfig) -> list[Sides]:
    """Return the same sides with each folder of weights that a run begins with, or without any."""
    if init.huggingface:
        return [sides_with(base, "init.huggingface", Path(init.huggingface))]
    if init.checkpoint:
        return [sides_with(base, "init.checkpoint", Path(init.checkpoint))]
    sides = [sides_with(base, "init.language", Path(init.language)) if init.language else base]
    if init.vision:
        # The tokenizer of a SigLIP folder is not the language model's.
        sides.append(replace(sides_with(base, "init.vision", Path(init.vision)), tokens=None))
    return sides


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the checkpoint that a run's `latest` names; None if it is not there or damaged, which is reported later."""
    pointer = run_folder / LATEST
    try:
        name = read_located(pointer.parent, pointer.name, LONGEST_POINTER).decode().strip()
        newest = locate(pointer.parent, name, "folder")
        read_run_state(newest)
    # Whichever it is: the run looks for its checkpoints without this file.
    except (PlaceError, OSError, UnicodeDecodeError, UserError):
        return None
    return newest


def section_of(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a part of a JSON object that is an object itself; empty if it is not there."""
    part = content.get(name)
    return part if isinstance(part, dict) else {}
