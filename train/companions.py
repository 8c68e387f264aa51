"""The files that travel with weights and hold none: which there are, and where those of a checkpoint lie. No torch here.

A run copies them into `huggingface/` in its folder when it starts, so that an export needs neither the folder that the run was
started in nor the ones that its options named.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from visionloom.data.config import MediaConfig
from visionloom.model.huggingface_config import CONFIG
from visionloom.train.config import RunConfig
from visionloom.train.state_file import CHECKPOINTS, STATE, Inputs, Progress, absolute, stored_inputs
from visionloom.train.token_table import SETTINGS, TOKENIZER, TokenTable

COMPANIONS: Final = "huggingface"
"""Folder inside a run's folder or an imported checkpoint with these files."""
FROM_TOKENIZER: Final = (
    TOKENIZER, SETTINGS, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
"""Files that data.tokenizer's folder is asked for first."""
GENERATION: Final = "generation_config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
VIDEO_PREPROCESSOR: Final = "video_preprocessor_config.json"
PROCESSOR: Final = "processor_config.json"
CARRIED: Final = (CONFIG, GENERATION, *FROM_TOKENIZER, PREPROCESSOR, VIDEO_PREPROCESSOR, PROCESSOR)
"""Files that an exported folder takes along; never code."""
SETTINGS_OF_RUN: Final = "config.yaml"


@dataclass(frozen=True)
class Companions:
    """What goes along with the weights of a checkpoint."""

    tokenizer: Path | None = None
    """Folder of the tokenizer that it was trained with."""
    others: list[Path] = field(default_factory=list)
    """Folders with the other files; the first that has one gives it."""
    media: MediaConfig | None = None
    """How pictures became pixels in training; None: nothing was trained."""
    weights: str = ""
    """The Hugging Face folder that the run began with; empty: none."""
    missing: list[str] = field(default_factory=list)
    """What should go along and is nowhere: a line each."""


def carry(source: Path, target: Path, names: tuple[str, ...] = CARRIED) -> None:
    """Copy those of the files that are there."""
    for name in names:
        if (source / name).is_file() and (source / name).resolve() != (target / name).resolve():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)


def carry_into_run(config: RunConfig, run_folder: Path) -> None:
    """Keep what an export will need in the run's folder: the tokenizer's files, and what came with its first weights."""
    init = config.init
    sources = [Path(init.huggingface)] if init.huggingface else []
    sources += companions_of(Path(init.checkpoint)) if init.checkpoint else []
    for source in reversed(sources):
        carry(source, run_folder / COMPANIONS)
    carry(Path(config.data.tokenizer), run_folder / COMPANIONS, FROM_TOKENIZER)


def companions_of(folder: Path) -> list[Path]:
    """Folders with the files of a Hugging Face folder (itself), or of a checkpoint: its own, or its run's."""
    if not (folder / STATE).is_file():
        return [folder] if folder.is_dir() else []
    run = run_of(folder)
    found = [folder / COMPANIONS, *([run / COMPANIONS] if run is not None else [])]
    return [each for each in found if each.is_dir()]


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in; None if it was moved elsewhere, whose other files are not its own."""
    for place in (checkpoint.absolute(), checkpoint.resolve()):  # checkpoints/ may be a link to another disk, or lead here
        if len(place.parents) > 2 and place.parents[1].name == CHECKPOINTS:
            return place.parents[2]
    return None


def companions(checkpoint: Path, progress: Progress, source: Path | None = None, weights: Path | None = None) -> Companions:
    """What goes along with a checkpoint's weights.

    Args:
        checkpoint: its folder.
        progress: its state.
        source: what everything but the media rules is taken from, by name; None: its run, and what that began with.
        weights: Hugging Face folder or checkpoint under its adapters, whose own files go first, but for the tokenizer.
    """
    inputs = inputs_of(checkpoint, progress)
    media = MediaConfig(**inputs.media) if inputs is not None else None  # checked by inputs_of
    if source is not None:
        place = source if (source / TOKENIZER).is_file() else tokenizer_of(checkpoint, progress)
        return Companions(place, [source], media)
    others = [*(companions_of(weights) if weights else []), *companions_of(checkpoint)]
    others += companions_of(Path(inputs.weights)) if inputs and inputs.weights else []
    found = tokenizer_of(checkpoint, progress)
    missing = []
    if found is None and (inputs is not None or tokenizer_hash(progress)):
        named = f"data.tokenizer={inputs.tokenizer}, which" if inputs is not None else "the one that"
        missing.append(
            f"no tokenizer goes along: {named} {checkpoint} was trained with is gone or another one now: put it back, or name a"
            " folder that has it with hf=DIR"
        )
    if inputs is not None and inputs.weights and not others:
        missing.append(
            f"no chat template and generation settings of {inputs.weights}, which the run began with, go along: it is gone:"
            " put it back, or name a folder that has them with hf=DIR"
        )
    begun = inputs.weights if inputs is not None and not (Path(inputs.weights) / STATE).is_file() else ""
    return Companions(found, others, media, begun, missing)


def tokenizer_of(checkpoint: Path, progress: Progress) -> Path | None:
    """The folder with the tokenizer that a checkpoint was trained with, or that came with it; None if it is nowhere."""
    inputs, known = inputs_of(checkpoint, progress), tokenizer_hash(progress)
    places = companions_of(checkpoint) + ([Path(inputs.tokenizer)] if inputs and inputs.tokenizer else [])
    there = [place for place in places if (place / TOKENIZER).is_file()]
    return next((place for place in there if TokenTable.read(place, "tokenizer").hash.startswith(known)), None)


def tokenizer_hash(progress: Progress) -> str:
    """SHA-256, or its first digits, of the tokenizer.json that a checkpoint was trained with; empty if unknown."""
    plan = progress.data.get("plan")
    found = progress.inputs.get("tokenizer_hash") or (plan.get("tokenizer") if isinstance(plan, dict) else None)
    return found if isinstance(found, str) else ""


def inputs_of(checkpoint: Path, progress: Progress) -> Inputs | None:
    """What a checkpoint was trained with: from its state, or, of older versions, its run's config.yaml; None if nothing says."""
    if (found := stored_inputs(progress)) is not None:
        return found
    run = run_of(checkpoint)
    if run is None or not (run / SETTINGS_OF_RUN).is_file():
        return None
    raw: dict[str, Any] = yaml.safe_load((run / SETTINGS_OF_RUN).read_text()) or {}
    data, init = raw.get("data", {}), raw.get("init", {})
    start = _start_folder(run, str(raw.get("run", {}).get("folder", "")))
    weights = init.get("huggingface") or init.get("checkpoint") or ""
    folders = (absolute(str(start / folder)) if folder else "" for folder in (data.get("tokenizer", ""), weights))
    return Inputs(next(folders), tokenizer_hash(progress), data.get("media", {}), next(folders))


def _start_folder(run_folder: Path, said: str) -> Path:
    """The folder that a run was started in, as its own relative folder tells; else this process's."""
    steps = Path(said).parts
    if not said or Path(said).is_absolute() or run_folder.parts[-len(steps) :] != steps:
        return Path()
    return run_folder.parents[len(steps) - 1]
