"""The files that travel with weights and hold none: list them, and find those of a checkpoint. No torch here.

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
from visionloom.common.places import PlaceError, PlaceKind, locate, read_located
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
"""Files that come from data.tokenizer's folder if it has them."""
GENERATION: Final = "generation_config.json"
PREPROCESSOR: Final = "preprocessor_config.json"
VIDEO_PREPROCESSOR: Final = "video_preprocessor_config.json"
PROCESSOR: Final = "processor_config.json"
LARGEST: Final = 1 << 28
"""Bytes of a file that goes along: 256 MiB; Qwen's tokenizer.json, the largest, has 11."""
CARRIED: Final = (CONFIG, GENERATION, *FROM_TOKENIZER, PREPROCESSOR, VIDEO_PREPROCESSOR, PROCESSOR)
"""Files that an exported folder takes along; never code."""
SETTINGS_OF_RUN: Final = "config.yaml"
FOLDER_OPTIONS: Final = ("run.folder", "data.tokenizer", "init.huggingface", "init.checkpoint")
"""Options whose folders are read from a run's config.yaml."""
HASH: Final = re.compile("[0-9a-f]{8}|[0-9a-f]{64}")
"""A SHA-256, or its first digits, which data's state has."""


@dataclass(frozen=True)
class Companions:
    """The files that go along with a checkpoint's weights, by the folders that hold them."""

    tokenizer: Path | None = None
    """Folder of the tokenizer that the checkpoint was trained with."""
    others: list[Path] = field(default_factory=list)
    """Folders with the other files; the first that has one gives it."""
    media: MediaConfig | None = None
    """How pictures became pixels in training; None: nothing was trained."""
    chat_format: str | None = None
    """How chats were written in training; None: nothing was trained."""
    weights: str = ""
    """The Hugging Face folder that the run began with; empty: none."""
    missing: list[str] = field(default_factory=list)
    """A line for each thing that should go along and is nowhere."""
    named: bool = False
    """Only the checkpoint names the tokenizer's folder: of it tokenizer.json alone is used, which the hash proves."""


def carry(source: Path, target: Path, names: Sequence[str] = CARRIED) -> None:
    """Copy those of the files that `source` has.

    Raises:
        UserError: for one that leads elsewhere, or is no regular file of usual size.
    """
    for name in names:
        path = _located(source, name, "file")
        if path is None:
            continue
        size = path.stat().st_size
        if size > LARGEST:
            raise UserError(
                f"{path} has {size} bytes, a file that goes along with weights at most {LARGEST}"
            )
        # A run may be started again from its own companions.
        if path.resolve() != (target / name).resolve():
            target.mkdir(parents=True, exist_ok=True)
            # Replaced, not opened: a link at the target would be written through.
            with path.open("rb") as original, replacing(target / name) as copy:
                shutil.copyfileobj(original, copy)


def carry_into_run(init: InitConfig, tokenizer: str, run_folder: Path) -> None:
    """Copy the files that an export will need into the run's folder: those of `tokenizer` and those of `init`."""
    if (run_folder / COMPANIONS).is_symlink():
        raise UserError(
            f"{run_folder / COMPANIONS} is a link: put the folder itself there, or remove it"
        )
    sources = [Path(init.huggingface)] if init.huggingface else []
    sources += companions_of(Path(init.checkpoint)) if init.checkpoint else []
    # The first has the last word, and the tokenizer above all.
    for source in reversed(sources):
        carry(source, run_folder / COMPANIONS)
    carry(Path(tokenizer), run_folder / COMPANIONS, FROM_TOKENIZER)


def companions_of(folder: Path) -> list[Path]:
    """Return the folders with the files of a Hugging Face folder (itself) or a checkpoint (its own, then its run's)."""
    if not (folder / STATE).is_file():
        return [folder] if folder.is_dir() else []
    run = run_of(folder)
    places = [folder] if run is None else [folder, run]
    folders = []
    for place in places:
        if (own := _located(place, COMPANIONS, "folder")) is not None:
            folders.append(own)
    return folders


def _located(folder: Path, name: str, kind: PlaceKind) -> Path | None:
    """Return a file or folder of `folder`; None if it is not there, UserError if it leads elsewhere."""
    try:
        return locate(folder, name, kind)
    except FileNotFoundError:
        return None
    except PlaceError as error:
        raise UserError(f"{folder / name} {error}: put the {kind} itself there") from None


def run_of(checkpoint: Path) -> Path | None:
    """Return the folder of a checkpoint's run; None if it was moved out, to where other files are not its own."""
    # Both: checkpoints/ may be a link to another disk, or a link may lead to it.
    for place in (checkpoint.absolute(), checkpoint.resolve()):
        if len(place.parents) > 2 and place.parents[1].name == CHECKPOINTS:
            return place.parents[2]
    return None


def companions(
    checkpoint: Path, run_state: RunState, source: Path | None = None, weights: Path | None = None
) -> Companions:
    """Find the files that go along with a checkpoint's weights.

    They are in its own folder, in its run's, or in `source`. A folder that only its state names, which a stranger may have
    written, gives the tokenizer.json of the very hash in the state, and nothing else.

    Args:
        checkpoint: its folder.
        run_state: its state.
        source: folder of everything but the media rules; None: its run, and the folder that the run began with.
        weights: Hugging Face folder or checkpoint under its adapters, whose own files go first, but for the tokenizer.
    """
    inputs = inputs_of(checkpoint, run_state)
    media = chat_format = None
    if inputs is not None:
        media, chat_format = MediaConfig(**inputs.media), inputs.chat_format  # checked by inputs_of
    own = companions_of(checkpoint)
    tokenizer = tokenizer_of(checkpoint, run_state)
    if source is not None:
        if (source / TOKENIZER).is_file():
            tokenizer = source
        named = tokenizer not in (None, source, *own)
        return Companions(tokenizer, [source], media, chat_format, named=named)

    others = companions_of(weights) + own if weights else own
    begun = inputs.weights if inputs is not None else ""
    missing = []
    if tokenizer is None and (inputs is not None or tokenizer_hash(run_state)):
        missing.append(lost_tokenizer(checkpoint, inputs))
    if begun and not others:
        missing.append(
            f"no chat template and generation settings of {begun}, which the run began with, go along: its run's"
            f" {COMPANIONS}/ is gone: name a folder that has them with hf=DIR"
        )
    return Companions(
        tokenizer,
        others,
        media,
        chat_format,
        weights="" if (Path(begun) / STATE).is_file() else begun,
        missing=missing,
        named=tokenizer is not None and tokenizer not in own,
    )


def lost_tokenizer(checkpoint: Path, inputs: Inputs | None) -> str:
    """Return the line for a checkpoint whose tokenizer is nowhere."""
    option = f"data.tokenizer={inputs.tokenizer}, which" if inputs is not None else "the one that"
    return (
        f"no tokenizer goes along: {option} {checkpoint} was trained with is gone or another one now:"
        " put it back, or name a folder that has it with hf=DIR"
    )


def tokenizer_of(checkpoint: Path, run_state: RunState) -> Path | None:
    """Find the folder with the tokenizer that a checkpoint was trained with, or came with; None if it is nowhere."""
    inputs = inputs_of(checkpoint, run_state)
    known = tokenizer_hash(run_state)
    places = companions_of(checkpoint)
    if known and inputs and inputs.tokenizer:
        places.append(Path(inputs.tokenizer))
    for place in places:
        digest = _tokenizer_hash_in(place)
        # Without a known hash any tokenizer of the checkpoint's own will do.
        if digest and digest.startswith(known):
            return place
    return None


def _tokenizer_hash_in(folder: Path) -> str:
    """Return the SHA-256 of a folder's tokenizer.json; empty if it has none."""
    try:
        return hashlib.sha256(read_located(folder, TOKENIZER, LARGEST)).hexdigest()
    except (PlaceError, OSError):
        return ""


def tokenizer_hash(run_state: RunState) -> str:
    """Return the SHA-256, or its first digits, of the tokenizer.json of a checkpoint's training; empty if unknown."""
    stored = run_state.inputs.get("tokenizer_hash")
    plan = run_state.data.get("plan")
    # Versions that kept no inputs had the first digits in the plan.
    if not stored and isinstance(plan, dict):
        stored = plan.get("tokenizer")
    return stored if isinstance(stored, str) and HASH.fullmatch(stored) else ""


def inputs_of(checkpoint: Path, run_state: RunState) -> Inputs | None:
    """Return the inputs of a checkpoint's training; None if nothing says.

    They are in its state, or, of older versions, in its run's config.yaml.

    Raises:
        UserError: if config.yaml is damaged.
    """
    if (inputs := stored_inputs(run_state)) is not None:
        return inputs
    run = run_of(checkpoint)
    if run is None or not (run / SETTINGS_OF_RUN).is_file():
        return None
    try:
        settings = RunSettings.read(run)
    except (JsonError, OSError) as error:
        raise UserError(
            f"{error}: put back the file of the run, or name a folder with hf=DIR"
        ) from None
    return Inputs(
        tokenizer=settings.folder_of("data.tokenizer"),
        tokenizer_hash=tokenizer_hash(run_state),
        media=asdict(settings.media),
        weights=settings.folder_of("init.huggingface") or settings.folder_of("init.checkpoint"),
    )


@dataclass(frozen=True)
class RunSettings:
    """What a run's config.yaml says of the inputs of its training."""

    run_folder: Path
    options: dict[str, str]
    """Folders as they are written there, by option."""
    media: MediaConfig

    @classmethod
    def read(cls, run_folder: Path) -> "RunSettings":
        """Read a run's config.yaml.

        Raises:
            JsonError: if a value is of another type.
            OSError: if the file cannot be read.
        """
        where = str(run_folder / SETTINGS_OF_RUN)
        content = read_yaml(run_folder, SETTINGS_OF_RUN)
        sections = {}
        for name in ("run", "data", "init"):
            sections[name] = checked(content.get(name, {}), dict[str, Any], where, name)
        options = {}
        for option in FOLDER_OPTIONS:
            section, _, key = option.partition(".")
            options[option] = checked(sections[section].get(key) or "", str, where, option)
        media = checked(sections["data"].get("media", {}), MediaConfig, where, "data.media")
        return cls(run_folder, options, media)

    def folder_of(self, option: str) -> str:
        """Return the absolute folder that an option names; empty if it names none."""
        written = self.options[option]
        return absolute(str(self._start_folder() / written)) if written else ""

    def _start_folder(self) -> Path:
        """Return the folder that the run was started in, as its own relative folder shows; else this process's."""
        written = Path(self.options["run.folder"])
        steps = written.parts
        is_relative = bool(steps) and not written.is_absolute()
        if not is_relative or self.run_folder.parts[-len(steps) :] != steps:
            return Path()
        return self.run_folder.parents[len(steps) - 1]
