"""state.json of a checkpoint: where a run stands, and what it was given. Nothing here imports torch."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig
from visionloom.model.config import ModelConfig, TextConfig, VisionConfig

STATE: Final = "state.json"
CHECKPOINTS: Final = "checkpoints"
"""Folder inside a run's with a folder for each phase, and in that one for each checkpoint."""


@dataclass(frozen=True)
class Inputs:
    """What a run reads by and begins with, which its exports must agree with; folders are absolute."""

    tokenizer: str
    """Folder of data.tokenizer."""
    tokenizer_hash: str
    """SHA-256 of its tokenizer.json."""
    media: dict[str, Any]
    """MediaConfig."""
    weights: str
    """Folder of init.huggingface or init.checkpoint; empty: none."""

    @classmethod
    def of(cls, data: DataConfig, tokenizer_hash: str, weights: str) -> "Inputs":
        """The inputs of a run; relative folders begin where this process runs."""
        return cls(absolute(data.tokenizer), tokenizer_hash, asdict(data.media), absolute(weights))


@dataclass(frozen=True)
class Progress:
    """Where a run stands: what a checkpoint holds beside tensors."""

    phase: str
    phase_step: int
    """Optimizer steps done in the phase."""
    step: int
    """Optimizer steps done in the run."""
    phase_steps: int
    """Optimizer steps of the whole phase."""
    data: dict[str, Any]
    """PackStream.state."""
    model: dict[str, Any]
    """ModelConfig, to name what changed."""
    updates: int
    """Steps of the phase that were not skipped: what the optimizer counts."""
    lora: dict[str, Any] = field(default_factory=dict)
    """LoraConfig, where the checkpoint holds adapters and not the weights below them."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Inputs; empty in an imported checkpoint, and in those of versions that did not keep it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that count for going on, by option (train/changes.py); empty as `inputs` is."""

    @property
    def phase_done(self) -> bool:
        """Whether the phase's last step is in this checkpoint."""
        return self.phase_step >= self.phase_steps


def model_of(progress: Progress) -> ModelConfig:
    """The model that a checkpoint's state names."""
    stored = progress.model
    return ModelConfig(stored["name"], text=TextConfig(**stored["text"]), vision=VisionConfig(**stored["vision"]))


def absolute(folder: str) -> str:
    """A folder by its absolute path; empty stays empty."""
    return str(Path(folder).absolute()) if folder else ""


def read_progress(folder: Path) -> Progress:
    """What a checkpoint's state.json says; UserError if there is none."""
    try:
        return Progress(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{folder} is not a checkpoint of this version ({error}): name a folder such as checkpoints/<phase>/step-00000100"
        ) from error
