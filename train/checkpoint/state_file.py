"""state.json of a checkpoint: where a run stands, and its inputs. Nothing here imports torch."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from visionloom.common.count import Count
from visionloom.common.errors import UserError, unknown
from visionloom.common.jsonfile import JsonError, checked, read_json
from visionloom.common.settings import check
from visionloom.common.text import one_line
from visionloom.data.config import CHAT_FORMATS, INSTRUCT, DataConfig, MediaConfig
from visionloom.model.config import ModelConfig
from visionloom.model.lora_config import LoraConfig
from visionloom.train.old_options import todays_settings

STATE: Final = "state.json"
LARGEST: Final = 1 << 20
"""Bytes of a state.json: 1 MiB; the tiny model's with seven datasets has 1,700, and up to 5,000 more in a long phase."""
CHECKPOINTS: Final = "checkpoints"
"""Folder inside a run's with a folder for each phase, and in that one for each checkpoint."""


@dataclass(frozen=True)
class Inputs:
    """Tokenizer, media rules and first weights of a run, which its exports must agree with; folders are absolute."""

    tokenizer: str
    """Folder of data.tokenizer."""
    tokenizer_hash: str
    """SHA-256 of its tokenizer.json."""
    media: dict[str, Any]
    """MediaConfig."""
    weights: str
    """Folder of init.huggingface or init.checkpoint; empty: none."""
    chat_format: str = INSTRUCT
    """data.chat_format; versions that did not keep it had this one."""

    @classmethod
    def of(cls, data: DataConfig, tokenizer_hash: str, weights: str) -> "Inputs":
        """Collect the inputs of a run; relative folders begin where this process runs."""
        tokenizer, media = absolute(data.tokenizer), asdict(data.media)
        return cls(tokenizer, tokenizer_hash, media, absolute(weights), data.chat_format)


@dataclass(frozen=True)
class RunState:
    """Where a run stands: all of a checkpoint but its tensors."""

    phase: str
    phase_step: Count
    """Optimizer steps done in the phase."""
    step: Count
    """Optimizer steps done in the run."""
    phase_steps: Count
    """Optimizer steps of the whole phase."""
    data: dict[str, Any]
    """PackStream.state."""
    model: dict[str, Any]
    """ModelConfig, to name what changed."""
    updates: Count
    """Steps of the phase that were not skipped: the optimizer's count."""
    lora: dict[str, Any] = field(default_factory=dict)
    """LoraConfig, where the checkpoint holds adapters and not the weights below them."""
    inputs: dict[str, Any] = field(default_factory=dict)
    """Inputs; empty in an imported checkpoint, and in those of versions that did not keep it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that count for continuing, by option (train/changes.py); empty as `inputs` is."""
    recent: dict[str, list[float]] = field(default_factory=dict)
    """StepJudge.state; empty as `inputs` is."""

    @property
    def phase_done(self) -> bool:
        """Return whether the phase's last step is in this checkpoint."""
        return self.phase_step >= self.phase_steps


def model_of(run_state: RunState, where: str = STATE) -> ModelConfig:
    """Return the model that a checkpoint's state names; UserError, which begins with `where`, if it cannot be."""
    model = _part(todays_settings(run_state.model, "model"), ModelConfig, "model", where)
    _refuse(where, "a model that cannot be built", check(model, "model").lines)
    return model


def lora_of(run_state: RunState, where: str = STATE) -> LoraConfig | None:
    """Return the adapters that a checkpoint's state names, None without; UserError if they cannot be."""
    if not run_state.lora:
        return None
    lora = _part(todays_settings(run_state.lora, "lora"), LoraConfig, "lora", where)
    problems = check(lora, "lora").lines
    if not problems and not lora.rank:
        problems = ["lora.rank=0"]
    elif not problems:
        problems = lora.layer_problems(model_of(run_state, where))
    _refuse(where, "adapters that cannot be", problems)
    return lora


def stored_inputs(run_state: RunState, where: str = STATE) -> Inputs | None:
    """Return the inputs in a checkpoint's state, None without; UserError if they cannot be."""
    if not run_state.inputs:
        return None
    inputs = _part(run_state.inputs, Inputs, "inputs", where)
    media = _part(inputs.media, MediaConfig, "inputs.media", where)
    _refuse(where, "media that cannot be read", check(media, "data.media").lines)
    if inputs.chat_format not in CHAT_FORMATS:
        wrong = unknown("data.chat_format", inputs.chat_format, CHAT_FORMATS)
        _refuse(where, "chats that cannot be written", [wrong])
    return inputs


def _refuse(where: str, what: str, problems: list[str]) -> None:
    """Raise UserError if there are problems, which name values of a file that a stranger may have written."""
    if problems:
        listed = one_line("; ".join(problems))
        raise UserError(f"{where} names {what}: {listed}: take a checkpoint of this version")


def absolute(folder: str) -> str:
    """Return a folder's absolute path; empty stays empty."""
    return str(Path(folder).absolute()) if folder else ""


def read_run_state(folder: Path) -> RunState:
    """Read a checkpoint's state.json and check its parts; UserError if it is missing or damaged."""
    try:
        run_state = read_json(folder, STATE, RunState, LARGEST)
    except (OSError, JsonError) as error:
        raise UserError(
            f"{folder} is not a checkpoint of this version ({error}): name a folder such as checkpoints/<phase>/step-00000100"
        ) from error
    # Here once, so that later uses of the parts cannot fail.
    for part in (model_of, lora_of, stored_inputs):
        part(run_state, str(folder / STATE))
    return run_state


def _part[T](value: Any, schema: type[T], name: str, where: str) -> T:
    """Return a part of a state in its type; UserError if it is of another form."""
    try:
        return checked(value, schema, where, name)
    except JsonError as error:
        raise UserError(f"{error}: take a checkpoint of this version") from error
