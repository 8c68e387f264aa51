"""Compose a run from recipes/ and the command line, and refuse what cannot work, before torch is imported.

A command is `start(train)`, where `train` takes the checked RunConfig and imports what it needs only then.
Hydra composes (`+recipe=NAME`, `key=value`, `--config-dir`, `--cfg job`, `--help`); the dataclasses of train/config.py are
the schema. Hydra alone would print a stack of messages once a rank and let wrong keys behind a `+` pass.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from visionloom.common.errors import MachineError, UserError
from visionloom.common.text import warn
from visionloom.data.config import DatasetConfig
from visionloom.launch import environment
from visionloom.launch.exit import FAILURE, end_with_parent, exit_with, record_for_torchrun, write_status
from visionloom.launch.explain import available, explain, no_such_key, unknown_keys
from visionloom.launch.quiet import quiet_libraries
from visionloom.launch.words import readable
from visionloom.parallel.config import ParallelConfig
from visionloom.train.config import PhaseConfig, RunConfig

MISSING_PATHS_SHOWN = 3
# Words that Hydra cannot apply: OmegaConf refuses to override inside an optional section that is None (a phase's layout), and
# to add an entry to a mapping of dataclasses. They are applied after composing, so `--cfg job` does not show them.
LATE = re.compile(r"\+{0,2}phases\.[^.=]+\.parallel[.=]|\+{1,2}(?:phases|data\.datasets|data\.validation)\.[^.=]+[.=]")


def start(command: Callable[[RunConfig], None], argv: Sequence[str] | None = None, checkpoint: str = "") -> None:
    """Compose the run of the command line and hand it to `command`; end with one line and exit code 2 on a UserError.

    Args:
        command: does the work; imports torch inside.
        argv: the command line without the program; None: sys.argv.
        checkpoint: the folder that the command is about, if it names one.
    """
    try:
        environment.check_environment()
    except UserError as error:
        exit_with(error)
    try:
        config = compose(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        exit_with(error, everywhere=True)
    if config is None:
        return
    quiet_libraries()
    end_with_parent()
    try:
        check_paths(config)
        check_agreements(config, checkpoint)
        command(config)
    except UserError as error:
        exit_with(error, folder=config.run.folder, step=getattr(error, "step", None))
    except Exception as error:
        write_status(
            config.run.folder, FAILURE, f"{type(error).__name__}: {error}", None, "start the same command again to resume"
        )
        record_for_torchrun(error)
        if isinstance(error, MachineError):
            warn(f"error: {error}")
            sys.exit(FAILURE)
        raise
    if os.environ.get("RANK", "0") == "0":
        write_status(config.run.folder, 0, "done", None, "")


def split_options(argv: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Take a command's own `name=value` words from the command line: (their values, the words left for Hydra)."""
    own = {word.partition("=")[0]: word.partition("=")[2] for word in argv if word.partition("=")[0] in names}
    return own, [word for word in argv if word.partition("=")[0] not in names]


def compose(argv: Sequence[str], world_size: int | None = None) -> RunConfig | None:
    """The checked configuration of a command line; None where the line asks to be shown something (`--help`, `--cfg`).

    Args:
        argv: the command line without the program.
        world_size: ranks that will run; None: WORLD_SIZE of the environment, or 1.

    Raises:
        UserError: one line a fault, each naming the option, with a suggestion for a mistyped name.
    """
    _check_words(argv)
    read = readable(argv)
    words, late = ([word for word in read if bool(LATE.match(word)) is is_late] for is_late in (False, True))
    shown, others = _option(words, "--cfg|-c")
    if shown == "job" and not _option(words, "--package|-p")[0]:
        _show(_compose([word for word in others if word != "--resolve"]), late, "--resolve" in others)
        return None
    config = _compose(words)
    if config is None:
        return None
    run = _typed(config, late)
    run.run.folder = run.run.folder or f"runs/{run.run.name}"
    if found := run.problems(world_size or environment.world_size()):
        raise UserError("\n".join(found))
    return run


def check_paths(config: RunConfig) -> None:
    """Refuse input folders that do not exist.

    Raises:
        UserError: naming the option and the folder; a few are shown if many are missing.
    """
    optional = {"init.huggingface": config.init.huggingface, "init.checkpoint": config.init.checkpoint}
    optional["lora.adapter"] = config.lora.adapter
    paths = {"data.tokenizer": config.data.tokenizer} | {option: path for option, path in optional.items() if path}
    paths |= {f"data.datasets.{name}.path": dataset.path for name, dataset in config.data.datasets.items()}
    paths |= {f"data.validation.{name}.path": dataset.path for name, dataset in config.data.validation.items()}
    missing = [f"{option}={path}" for option, path in paths.items() if not path or not Path(path).is_dir()]
    if not missing:
        return
    more = len(missing) - MISSING_PATHS_SHOWN
    lines = [f"{path} is not a folder: correct the option or make the folder first" for path in missing[:MISSING_PATHS_SHOWN]]
    if more > 0:
        lines.append(f"{more} more input folders do not exist")
    if "demo-data" in missing[0]:
        lines.append("the demo's data is made by: python launch/data.py demo runs/demo-data")
    raise UserError("\n".join(lines))


def check_agreements(config: RunConfig, checkpoint: str = "") -> None:
    """Refuse a run whose parts do not agree; see train/agreements.py, which is imported only now since it reads tokenizers."""
    from visionloom.train.agreements import check_run

    check_run(config, checkpoint)


def _check_words(words: Sequence[str]) -> None:
    """Refuse, with their cure, the words that Hydra would answer with advice that does not help here."""
    if {"-m", "--multirun"} & set(words):
        raise UserError("--multirun is refused: every rank would sweep by itself; start one run for each value")
    for word in words:
        if re.match(r"[+~]*=", word):
            raise UserError(f"command line: '{word}' has no key: write key=value")
        if word.startswith("recipe="):
            raise UserError(f"a recipe is added, not overridden: write +{word}")


def _compose(words: Sequence[str]) -> DictConfig | None:
    """Let Hydra read the recipes and the command line; None where Hydra has answered the line itself."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
    composed: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path="pkg://visionloom.recipes", config_name="config")
    def take(config: DictConfig) -> None:
        composed.append(config)

    messages = io.StringIO()
    options_last = sorted(words, key=lambda word: word.startswith("-"))  # argparse refuses a=1 --cfg job b=2
    try:
        with _as_command_line(options_last), contextlib.redirect_stderr(messages):
            take()
    except BrokenPipeError:
        _read_no_more()
        return None
    except Exception as error:  # Hydra only reads the user's input here, and fails on odd input with errors of any type
        raise UserError(explain(error, _option(words, "--config-dir|-cd")[0])) from error
    except SystemExit as stop:
        if stop.code:  # argparse: its last line is `PROGRAM: error: unrecognized arguments: --nope`
            raise UserError("command line: " + messages.getvalue().strip().rpartition("error: ")[2]) from stop
        return None
    sys.stderr.write(messages.getvalue())
    return composed[0] if composed else None


@contextlib.contextmanager
def _as_command_line(words: Sequence[str]) -> Iterator[None]:
    """Show Hydra these words in sys.argv, and make it raise its errors instead of printing them and exiting with 1."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [argv[0], *words], "1"
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR")
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _option(words: Sequence[str], names: str) -> tuple[str, list[str]]:
    """The value behind one of these options, as `--cfg|-c`, empty if there is none, and the words without it."""
    for at, word in enumerate(words):
        if match := re.fullmatch(rf"(?:{names})(?:=(.*))?", word):
            end = at + (2 if match[1] is None else 1)
            return match[1] or "".join(words[at + 1 : end]), [*words[:at], *words[end:]]
    return "", list(words)


def _show(config: DictConfig | None, late: Sequence[str], resolve: bool) -> None:
    """Print what would run, as `--cfg job` of Hydra does, but with the words that are applied late."""
    if config is None:
        return
    try:
        _apply_all(config, late)
        text = OmegaConf.to_yaml(config, resolve=resolve)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _read_no_more()


def _read_no_more() -> None:
    """`--cfg job | head`: nobody reads on, and nothing is to be said of it when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _typed(config: DictConfig, late: Sequence[str]) -> RunConfig:
    """The dataclasses of a composed configuration, if every key is in the schema and nothing required is missing."""
    if not config.phases:
        raise UserError(f"no recipe: choose one with +recipe=NAME, NAME one of {', '.join(available('recipe'))}")
    try:
        _apply_all(config, late)
        faults = [no_such_key(path) for path in unknown_keys(config)]
        faults += [
            f"{key} is required: set it in the recipe or pass {key}=..." for key in sorted(OmegaConf.missing_keys(config))
        ]
        if faults:
            raise UserError("\n".join(faults))
        return cast(RunConfig, OmegaConf.to_object(config))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def _apply_all(config: DictConfig, late: Sequence[str]) -> None:
    for override in OverridesParser.create().parse_overrides(list(late)):
        _apply(config, override)


def _apply(config: DictConfig, override: Override) -> None:
    """Apply a word that matches LATE; a new phase must be given whole, so that a mistyped name is not taken for one."""
    parts = override.key_or_group.split(".")
    depth = 1 if parts[0] == "phases" else 2
    mapping, name, fields = OmegaConf.select(config, ".".join(parts[:depth])), parts[depth], parts[depth + 1 :]
    if name not in mapping and (override.is_add() or override.is_force_add()) and (not fields or parts[0] == "data"):
        with open_dict(mapping):
            mapping[name] = PhaseConfig() if parts[0] == "phases" else DatasetConfig()
    entry: Any = mapping[name]
    if fields[:1] == ["parallel"] and entry.parallel is None:
        entry.parallel = ParallelConfig()
    OmegaConf.update(config, override.key_or_group, override.value(), force_add="mixture" in fields)
