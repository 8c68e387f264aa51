"""What launch/teacher.py is asked for, and agreements of a phase with its teacher. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from visionloom.common.errors import UserError
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.stream.teacher_store import AGAIN, read_facts
from visionloom.model.config import ModelConfig
from visionloom.model.distillation_config import DistillationConfig
from visionloom.model.huggingface.config import read_config
from visionloom.train.checkpoint.state_file import model_of, read_run_state
from visionloom.train.config import RunConfig

KEPT: Final = 64
"""Tokens of a row unless another number is asked for."""
WORDS: Final = ("out", "checkpoint", "phase", "kept", "temperature", "dtype")
DTYPES: Final = ("fp16", "fp32")


@dataclass(frozen=True)
class StoreOptions:
    """A store of a teacher that is to be written."""

    out: str
    """Folder of the store."""
    phase: str
    """Its datasets, and lengths of packs, are the phase's."""
    checkpoint: str = ""
    """Of the teacher; empty: the weights that the run begins with."""
    kept: int = KEPT
    temperature: float = 1.0
    dtype: str = "fp16"

    @classmethod
    def of(cls, words: dict[str, str], config: RunConfig) -> "StoreOptions":
        """Return what the command line asks for; raises UserError with one line for a wrong word."""
        if not words.get("out"):
            raise UserError("out=DIR is missing: name a folder for the store")
        phases = list(config.phases)
        if "phase" not in words and len(phases) > 1:
            raise UserError(f"phase=NAME is missing: choose one of {', '.join(phases)}")
        phase = words.get("phase", phases[0])
        if phase not in phases:
            raise UserError(
                f"phase={phase} is not in the recipe: choose one of {', '.join(phases)}"
            )
        # Half of a store's bytes; fp32 shows that a store of all tokens is the live teacher.
        dtype = words.get("dtype", "fp16")
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
        kept = _number("kept", words.get("kept", str(KEPT)), 1, config.model.text.vocab_size)
        temperature = _number("temperature", words.get("temperature", "1"), 0.01, 100)
        if kept != int(kept):
            raise UserError(f"kept={kept:g} must be a whole number")
        checkpoint = words.get("checkpoint", "")
        if not (checkpoint or config.init.checkpoint or config.init.huggingface):
            raise UserError(
                "no teacher: name its weights by checkpoint=FOLDER, init.checkpoint or init.huggingface"
            )
        if "checkpoint" in words and not Path(checkpoint).is_dir():
            raise UserError(f"checkpoint={checkpoint} is not a folder: correct the option")
        return cls(words["out"], phase, checkpoint, int(kept), temperature, dtype)


def _number(name: str, text: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{name}={text} is not a number") from None
    if not least <= value <= most:
        raise UserError(f"{name}={text} must be at least {least:g} and at most {most:,.0f}")
    return value


def model_of_teacher(options: DistillationConfig, here: str) -> tuple[ModelConfig, str]:
    """Return the architecture of a live teacher, and the option that names it; raises UserError."""
    if options.teacher.huggingface:
        option = f"{here}.teacher.huggingface"
        return read_config(Path(options.teacher.huggingface), option), option
    run_state = read_run_state(Path(options.teacher.checkpoint))
    return model_of(run_state), f"{here}.teacher.checkpoint"


def live_teacher(config: RunConfig, phase_name: str) -> ModelConfig | None:
    """Return the architecture of a phase's live teacher; None where it has none, or its folder is not there."""
    options = config.phases[phase_name].distillation
    if options is None or not options.is_live:
        return None
    if not Path(options.teacher.checkpoint or options.teacher.huggingface).is_dir():
        return None
    model, _ = model_of_teacher(options, f"phases.{phase_name}.distillation")
    return model


def check_teachers(config: RunConfig) -> Iterator[str]:
    """Yield a line for each phase whose teacher does not fit its student."""
    for name, phase in config.phases.items():
        options, here = phase.distillation, f"phases.{name}.distillation"
        if options is None:
            continue
        if options.stored:
            yield from _store_faults(config, options, here)
            continue
        model, option = model_of_teacher(options, here)
        yield from _vocabulary_faults(config, model.text.vocab_size, option)
        layout, where = phase.parallel or config.parallel, "the student's parallel"
        if options.teacher.parallel is not None:
            layout, where = options.teacher.parallel, f"{here}.teacher.parallel"
        for fault in model.layout_problems(layout, where):
            yield f"{option}: {fault}"


def _vocabulary_faults(config: RunConfig, rows: int, option: str) -> Iterator[str]:
    own = config.model.text.vocab_size
    if rows != own:
        yield (
            f"{option} has a vocabulary of {rows} rows, but model.text.vocab_size={own}:"
            " a student learns from a teacher with its own tokenizer and as many rows"
        )


def _store_faults(config: RunConfig, options: DistillationConfig, here: str) -> Iterator[str]:
    option = f"{here}.stored"
    facts = read_facts(Path(options.stored), option)
    yield from _vocabulary_faults(config, facts.vocabulary, option)
    tokenizer = config.data.tokenizer
    if facts.tokenizer != Tokenizer(tokenizer).fingerprint:
        yield (
            f"{option} was made with another tokenizer than data.tokenizer={tokenizer}: give that one, or {AGAIN}"
        )
    # Of the most probable tokens alone no other temperature can be made.
    wanted, stored = options.temperature, facts.temperature
    if stored != wanted:
        yield (
            f"{here}.temperature={wanted:g}, but {option} was stored at {stored:g}:"
            f" set it alike, or {AGAIN} with temperature={wanted:g}"
        )
