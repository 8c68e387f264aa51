"""The files that travel with weights and hold none: which there are, and where those of a checkpoint lie. No torch here.

A run copies them into `huggingface/` in its folder when it starts, so that an export needs neither the folder that the run was
started in nor the ones that its options named.
"""

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, checked
from visionloom.common.places import PlaceError, locate, read_located
from visionloom.common.yamlfile import read_yaml
from visionloom.data.config import MediaConfig
from visionloom.model.huggingface.config import CONFIG
from visionloom.train.checkpoint.state_file import (
    CHECKPOINTS,
    STATE,
    Inputs,
    RunState,
    absolute,
    stored_inputs,
)
from visionloom.train.config import InitConfig
from visionloom.train.exchange.token_table import SETTINGS, TOKENIZER

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
LARGEST: Final = 1 << 28
"""Bytes of a file that goes along: 256 MiB; Qwen's tokenizer.json, the largest, has 11."""
CARRIED: Final = (CONFIG, GENERATION, *FROM_TOKENIZER, PREPROCESSOR, VIDEO_PREPROCESSOR, PROCESSOR)
"""Files that an exported folder takes along; never code."""
SETTINGS_OF_RUN: Final = "config.yaml"
HASH: Final = re.compile("[0-9a-f]{8}|[0-9a-f]{64}")
"""A SHA-256, or its first digits, which data's state has."""


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
    named: bool = False
    """Whether only the checkpoint names the tokenizer's folder: tokenizer.json, which the hash proves, is taken and nothing else."""


def carry(source: Path, target: Path, names: Sequence[str] = CARRIED) -> None:
    """Copy those of the files that are there; UserError for one that leads elsewhere, or is no regular file of usual size."""
    for name in names:
        try:
            path = locate(source, name)
        except FileNotFoundError:
            continue
        except PlaceError as error:
            raise UserError(f"{source / name} {error}: put the file itself there") from None
        if path.stat().st_size > LARGEST:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, a file that goes along with weights at most {LARGEST}"
            )
        if path.resolve() != (target / name).resolve():
            target.mkdir(parents=True, exist_ok=True)
            with (
                path.open("rb") as source_file,
                replacing(target / name) as file,
            ):  # which does not write through a link
                shutil.copyfileobj(source_file, file)


def carry_into_run(init: InitConfig, tokenizer: str, run_folder: Path) -> None:
    """Keep what an export will need in the run's folder: the files of `tokenizer`, its folder, and what came with `init`."""
    if (run_folder / COMPANIONS).is_symlink():
        raise UserError(
            f"{run_folder / COMPANIONS} is a link: put the folder itself there, or remove it"
        )
    sources = [Path(init.huggingface)] if init.huggingface else []
    sources += companions_of(Path(init.checkpoint)) if init.checkpoint else []
    for source in reversed(sources):
        carry(source, run_folder / COMPANIONS)
    carry(Path(tokenizer), run_folder / COMPANIONS, FROM_TOKENIZER)


def companions_of(folder: Path) -> list[Path]:
    """Folders with the files of a Hugging Face folder (itself), or of a checkpoint: its own, or its run's."""
    if not (folder / STATE).is_file():
        return [folder] if folder.is_dir() else []
    run = run_of(folder)
    found = []
    for place in [folder, *([run] if run is not None else [])]:
        try:
            found.append(locate(place, COMPANIONS, "folder"))
        except FileNotFoundError:
            continue
        except PlaceError as error:
            raise UserError(f"{place / COMPANIONS} {error}: put the folder itself there") from None
    return found


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in; None if it was moved elsewhere, whose other files are not its own."""
    for place in (
        checkpoint.absolute(),
        checkpoint.resolve(),
    ):  # checkpoints/ may be a link to another disk, or lead here
        if len(place.parents) > 2 and place.parents[1].name == CHECKPOINTS:
            return place.parents[2]
    return None


def companions(
    checkpoint: Path, run_state: RunState, source: Path | None = None, weights: Path | None = None
) -> Companions:
    """What goes along with a checkpoint's weights.

    Files lie beside it, in its run's folder, or where `source` says. A folder that only its state names, which a stranger may have
    written, is asked for the tokenizer.json of the very hash that the state has, and for nothing else.

    Args:
        checkpoint: its folder.
        progress: its state.
        source: what everything but the media rules is taken from, by name; None: its run, and what that began with.
        weights: Hugging Face folder or checkpoint under its adapters, whose own files go first, but for the tokenizer.
    """
    inputs = inputs_of(checkpoint, run_state)
    media = MediaConfig(**inputs.media) if inputs is not None else None  # checked by inputs_of
    if source is not None:
        place = source if (source / TOKENIZER).is_file() else tokenizer_of(checkpoint, run_state)
        return Companions(
            place, [source], media, named=place not in (None, source, *companions_of(checkpoint))
        )
    others = [*(companions_of(weights) if weights else []), *companions_of(checkpoint)]
    found = tokenizer_of(checkpoint, run_state)
    missing = []
    if found is None and (inputs is not None or tokenizer_hash(run_state)):
        named = (
            f"data.tokenizer={inputs.tokenizer}, which" if inputs is not None else "the one that"
        )
        missing.append(
            f"no tokenizer goes along: {named} {checkpoint} was trained with is gone or another one now: put it back, or name a"
            " folder that has it with hf=DIR"
        )
    if inputs is not None and inputs.weights and not others:
        missing.append(
            f"no chat template and generation settings of {inputs.weights}, which the run began with, go along: its run's"
            f" {COMPANIONS}/ is gone: name a folder that has them with hf=DIR"
        )
    begun = (
        inputs.weights
        if inputs is not None and not (Path(inputs.weights) / STATE).is_file()
        else ""
    )
    return Companions(
        found,
        others,
        media,
        begun,
        missing,
        found is not None and found not in companions_of(checkpoint),
    )


def tokenizer_of(checkpoint: Path, run_state: RunState) -> Path | None:
    """The folder with the tokenizer that a checkpoint was trained with, or that came with it; None if it is nowhere."""
    inputs, known = inputs_of(checkpoint, run_state), tokenizer_hash(run_state)
    places = companions_of(checkpoint) + (
        [Path(inputs.tokenizer)] if known and inputs and inputs.tokenizer else []
    )
    found = ((place, _tokenizer_hash_in(place)) for place in places)
    return next((place for place, digest in found if digest and digest.startswith(known)), None)


def _tokenizer_hash_in(folder: Path) -> str:
    """SHA-256 of a folder's tokenizer.json; empty if it has none."""
    try:
        return hashlib.sha256(read_located(folder, TOKENIZER, LARGEST)).hexdigest()
    except (PlaceError, OSError):
        return ""


def tokenizer_hash(run_state: RunState) -> str:
    """SHA-256, or its first digits, of the tokenizer.json that a checkpoint was trained with; empty if unknown."""
    plan = run_state.data.get("plan")
    found = run_state.inputs.get("tokenizer_hash") or (
        plan.get("tokenizer") if isinstance(plan, dict) else None
    )
    return found if isinstance(found, str) and HASH.fullmatch(found) else ""


def inputs_of(checkpoint: Path, run_state: RunState) -> Inputs | None:
    """What a checkpoint was trained with: from its state, or, of older versions, its run's config.yaml; None if nothing says."""
    if (found := stored_inputs(run_state)) is not None:
        return found
    run = run_of(checkpoint)
    if run is None or not (run / SETTINGS_OF_RUN).is_file():
        return None
    try:
        raw = {"run": {}, "data": {}, "init": {}} | read_yaml(run, SETTINGS_OF_RUN)
        where = str(run / SETTINGS_OF_RUN)
        parts = {
            name: checked(raw[name], dict[str, Any], where, name)
            for name in ("run", "data", "init")
        }
        folders = {
            option: checked(parts[part].get(option) or "", str, where, f"{part}.{option}")
            for part, option in (
                ("run", "folder"),
                ("data", "tokenizer"),
                ("init", "huggingface"),
                ("init", "checkpoint"),
            )
        }
        media = asdict(checked(parts["data"].get("media", {}), MediaConfig, where, "data.media"))
    except (JsonError, OSError) as error:
        raise UserError(
            f"{error}: put back the file of the run, or name a folder with hf=DIR"
        ) from None
    start = _start_folder(run, folders["folder"])
    weights = folders["huggingface"] or folders["checkpoint"]
    tokenizer, begun = (
        absolute(str(start / folder)) if folder else ""
        for folder in (folders["tokenizer"], weights)
    )
    return Inputs(tokenizer, tokenizer_hash(run_state), media, begun)


def _start_folder(run_folder: Path, said: str) -> Path:
    """The folder that a run was started in, as its own relative folder tells; else this process's."""
    steps = Path(said).parts
    if not said or Path(said).is_absolute() or run_folder.parts[-len(steps) :] != steps:
        return Path()
    return run_folder.parents[len(steps) - 1]
