"""Compose a run from recipes/ and the command line, and refuse what cannot work, before torch is imported.

A command is `start(train)`, where `train` takes the checked RunConfig and imports what it needs only then.
Hydra composes (`+recipe=NAME`, `key=value`, `--config-dir`, `--cfg job`, `--help`); the dataclasses of train/config.py are
the schema. Hydra alone would print a stack of messages once a rank and let wrong keys behind a `+` pass.
"""

import faulthandler
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.machinery import PathFinder
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from visionloom.common.errors import EarlyEnd, MachineError, UserError, unknown
from visionloom.common.quiet import quiet_libraries
from visionloom.common.ranks import ranks_here
from visionloom.common.text import one_line, warn
from visionloom.launch import environment
from visionloom.launch.composing.compose import compose_words
from visionloom.launch.composing.explain import (
    available,
    explain,
    no_such_key,
    unknown_keys,
)
from visionloom.launch.composing.late_words import LATE, apply_late
from visionloom.launch.composing.words import check_words, readable
from visionloom.launch.guarding.causes import (
    cause_of,
    hint_for,
    is_lost_connection,
    is_out_of_memory,
    of_the_machine,
)
from visionloom.launch.guarding.claim import claim
from visionloom.launch.guarding.exit import (
    FAILURE,
    attempt_folder,
    end_with_parent,
    exit_early,
    exit_interrupted,
    exit_with,
    keep_code,
    record_for_torchrun,
)
from visionloom.launch.guarding.hang import watch_hangs
from visionloom.launch.guarding.signals import hear_signals
from visionloom.launch.guarding.watch import watch_ranks
from visionloom.launch.options import read_options
from visionloom.launch.plan_commands.first import check_plan
from visionloom.launch.show import show
from visionloom.model.huggingface.shapes import parameter_count
from visionloom.train.config import COMMAND, RunConfig
from visionloom.train.observe import status
from visionloom.train.phase.config import PhaseConfig

MISSING_PATHS_SHOWN = 3
WRITTEN = ("run.folder", "data.cache", "data.store.cache")
"""Options that name folders which a run writes to."""


def start(
    command: Callable[[RunConfig], None],
    argv: Sequence[str] | None = None,
    checkpoint: str = "",
    trains: bool = True,
) -> None:
    """Compose the run of the command line and hand it to `command`; end with one line and exit code 2 on a UserError.

    Args:
        command: does the work; imports torch inside.
        argv: the command line without the program; None: sys.argv.
        checkpoint: the folder that the command is about, if it names one.
        trains: whether it writes the run: then no other process may, and status.json tells how it goes.
    """
    try:
        _start(command, sys.argv[1:] if argv is None else argv, checkpoint, trains)
    except KeyboardInterrupt:
        exit_interrupted()


def _start(
    command: Callable[[RunConfig], None], argv: Sequence[str], checkpoint: str, trains: bool
) -> None:
    try:
        environment.check_environment()
    except UserError as error:
        exit_with(error)
    try:
        config = compose(argv)
    except UserError as error:
        exit_with(error, everywhere=True)
    if config is None:
        return
    quiet_libraries()
    end_with_parent()
    # Before anything imports torch, which reads its variables once.
    if environment.trains_on_gpus(config.run.device):
        environment.record_collectives(config.run.folder)
        layouts = [phase.parallel or config.parallel for phase in config.phases.values()]
        environment.set_up_gpus(max(layout.tensor for layout in [config.parallel, *layouts]))
    # Cheap checks first: agreements read tokenizers, which takes most of a second.
    try:
        check_paths(config)
        check_program(config)
        check_memory(config)
        check_agreements(config, checkpoint)
        if trains:
            check_plan(config, argv)
        # Last: the folder is made only for a run that can start.
        if trains:
            claim(Path(config.run.folder))
    except UserError as error:
        exit_with(error, folder=config.run.folder if trains else "")
    except EarlyEnd as end:
        exit_early(end)
    watch_ranks()
    if trains:
        # Only now, as the folder of the attempt is there; NCCL reads it when it starts.
        if config.watch.measures_ranks(environment.machines()):
            environment.log_transports(attempt_folder())
        hear_signals()
        watch_hangs(Path(config.run.folder), config.watch.seconds)
    work(command, config)


def work(command: Callable[[RunConfig], None], config: RunConfig) -> None:
    """Run a command to its end, whatever that is, and leave its cause in status.json."""
    # Where a segmentation fault came from is shown on the process's own standard error.
    faulthandler.enable(2)
    try:
        # Before the command imports Megatron-core.
        from visionloom.parallel import topology as topologies

        topologies.prepare(topologies.choose_device(config.run.device))
        command(config)
    except UserError as error:
        exit_with(error)
    except EarlyEnd as end:
        exit_early(end)
    except Exception as error:
        folder = Path(config.run.folder)
        machine_error = of_the_machine(error, folder)
        if machine_error is not None:
            exit_with(machine_error)
        cause, hint = cause_of(error, folder), hint_for(error)
        written = status.current.failed(FAILURE, cause, hint)
        if is_out_of_memory(error) and written is not None:
            # Before its traceback, which is long and says nothing of a cure.
            warn(f"error: {one_line(cause)}; {hint}")
        code = written or FAILURE
        record_for_torchrun(error)
        keep_code(code)
        # What another rank has told is the cause of this: a second traceback would only hide it.
        if written is None and is_lost_connection(error):
            sys.exit(code)
        if isinstance(error, MachineError):
            warn(f"error: {one_line(str(error))}")
            sys.exit(code)
        if code == status.GAVE_UP:
            warn(f"error: {status.MOST_STARTS} starts without progress; {status.MEND}")
        raise
    status.current.done()


def split_options(
    argv: Sequence[str],
    names: Sequence[str],
) -> tuple[dict[str, str], list[str]]:
    """Take a command's own `name=value` words from the command line: (their values, the words left for Hydra)."""
    own, others = dict[str, str](), list[str]()
    for word in argv:
        name, _, value = word.partition("=")
        if name in names:
            own[name] = value
        else:
            others.append(word)
    return own, others


def compose(argv: Sequence[str], world_size: int | None = None) -> RunConfig | None:
    """Return the checked configuration of a command line; None if it asks to be shown something (`--help`, `--cfg`).

    Args:
        argv: the command line without the program.
        world_size: ranks that will run; None: WORLD_SIZE of the environment, or 1.

    Raises:
        UserError: one line a fault, each naming the option, with a suggestion for a mistyped name.
    """
    run = compose_unchecked(argv)
    if run is not None and (problems := run.all_problems(world_size or environment.world_size())):
        raise UserError(*problems)
    return run


def compose_unchecked(argv: Sequence[str]) -> RunConfig | None:
    """Do as `compose`, but for the values themselves and the ranks that they need."""
    options = read_options(argv)
    check_words(options.words)
    read = readable(options.words)
    words = [word for word in read if not LATE.match(word)]
    config = compose_words(words, options.config_dir)
    try:
        _check_folders(config, read)
        apply_late(config, [word for word in read if LATE.match(word)])
        if options.help or options.show:
            show(config, options)
            return None
        run = _typed(config)
        _check_command(run, read)
        _check_functions(run, read)
    except (UserError, OSError):
        raise
    except Exception as error:
        # As in compose_words: the references of a recipe are followed only here.
        raise UserError(explain(error, options.config_dir)) from error

    # Here and not in the schema: the default is made of another option.
    run.run.folder = run.run.folder or f"runs/{run.run.name}"
    run.phases = _chosen_phases(run)
    if run.run.phase and run.run.phase not in run.phases:
        raise UserError(unknown("run.phase", run.run.phase, list(run.phases)))
    return run


def _chosen_phases(config: RunConfig) -> dict[str, PhaseConfig]:
    """Return the phases that run.phases names, in the recipe's order; all if it is empty."""
    chosen = config.run.phases
    if lines := [
        unknown("run.phases", name, list(config.phases))
        for name in chosen
        if name not in config.phases
    ]:
        raise UserError(*lines)
    if not chosen:
        return config.phases
    return {name: phase for name, phase in config.phases.items() if name in chosen}


def check_paths(config: RunConfig) -> None:
    """Refuse input folders that do not exist.

    Raises:
        UserError: naming the option and the folder; a few are shown if many are missing.
    """
    missing = []
    for option, path in _input_folders(config).items():
        if not path or not Path(path).is_dir():
            missing.append(f"{option}={path}")
    if not missing:
        return

    lines = []
    for path in missing[:MISSING_PATHS_SHOWN]:
        lines.append(f"{path} is not a folder: correct the option or make the folder first")
    more = len(missing) - MISSING_PATHS_SHOWN
    if more > 0:
        lines.append(f"{more} more input folders do not exist")
    if "demo-data" in missing[0]:
        lines.append("the demo's data is made by: python launch/data.py demo runs/demo-data")
    raise UserError(*lines)


def check_program(config: RunConfig) -> None:
    """Refuse an evaluation.command whose program the main rank's machine lacks: it would be missed after the training."""
    words = shlex.split(config.evaluation.command)
    if words and os.environ.get("RANK", "0") == "0" and shutil.which(words[0]) is None:
        raise UserError(
            f"{COMMAND}: no program {words[0]} that can be run is found: install it, or write its path"
        )


def _input_folders(config: RunConfig) -> dict[str, str]:
    """Return the folders that a run reads, by their options."""
    optional = _folders_of_weights(config)
    folders = {"data.tokenizer": config.data.tokenizer}
    folders |= {option: path for option, path in optional.items() if path}
    for name in sorted(config.datasets_read & set(config.data.datasets)):
        folders[f"data.datasets.{name}.path"] = config.data.datasets[name].path
    for name, dataset in config.data.validation.items():
        folders[f"data.validation.{name}.path"] = dataset.path
    return folders


def _folders_of_weights(config: RunConfig) -> dict[str, str]:
    """Return the folders of weights and teachers by their options; what is empty is not read."""
    folders = {"lora.adapter": config.lora.adapter}
    for each in fields(config.init):
        folders[f"init.{each.name}"] = getattr(config.init, each.name)
    for name, phase in config.phases.items():
        if (distillation := phase.distillation) is not None:
            here, live = f"phases.{name}.distillation", distillation.teacher
            folders[f"{here}.stored"] = distillation.stored
            folders[f"{here}.teacher.checkpoint"] = live.checkpoint
            folders[f"{here}.teacher.huggingface"] = live.huggingface
    return folders


def check_memory(config: RunConfig) -> None:
    """Refuse a model whose weights alone are more than this machine has, where it trains on CPUs.

    Raises:
        UserError: naming the model, its parameters and both sizes.
    """
    if environment.trains_on_gpus(config.run.device):
        return

    parameters = parameter_count(config.model)
    needed = bytes_of_weights(config, parameters)
    there = environment.memory_bytes()
    if needed > there:
        takes, has = f"{needed / 2**30:,.0f} GiB", f"{there / 2**30:,.0f} GiB"
        raise UserError(
            f"model={config.model.name} has {parameters:,} parameters: their weights take {takes} on this machine,"
            f" which has {has}: choose a smaller model, more machines, or run.device=cuda"
        )


def bytes_of_weights(config: RunConfig, parameters: int) -> int:
    """Return the bytes that the weights take on this machine, at least."""
    layout = config.parallel
    # Weights alone: gradients and the optimizer take several times as much, but may be sharded.
    shares = layout.tensor * layout.pipeline * layout.expert * (layout.expert_tensor or 1)
    bytes_each = 2 if config.run.precision == "bf16" else 4
    return parameters * bytes_each // shares * ranks_here()


def check_agreements(config: RunConfig, checkpoint: str = "") -> None:
    """Refuse a run whose parts do not agree; see train/agreements.py."""
    # Imported only now, since it reads tokenizers, which takes most of a second.
    from visionloom.train.agreements import check_run
    from visionloom.train.distillation.options import check_teachers

    check_run(config, checkpoint)
    if lines := list(check_teachers(config)):
        raise UserError(*lines)


def _check_folders(config: DictConfig, words: Sequence[str]) -> None:
    """Refuse folders that a run writes to, or deletes from, where a recipe names them: that is for the command line."""
    given = [word.lstrip("+").partition("=")[0] for word in words]
    for option in WRITTEN:
        value = OmegaConf.select(config, option, throw_on_missing=False, default="")
        if value and not any(f"{option}.".startswith(f"{key}.") for key in given):
            raise UserError(
                f"{option}={value} in a recipe is refused: a run writes there, so it is said on the command line only, {option}=DIR"
            )


def _check_command(config: RunConfig, words: Sequence[str]) -> None:
    """Refuse a program to run that any recipe has had a part in: only a word of the command line names it, and names it whole."""
    whole = [word.lstrip("+").partition("=")[0] for word in words if "${" not in word]
    if config.evaluation.command and COMMAND not in whole:
        raise UserError(
            f"{COMMAND} in a recipe is refused: a program that a run starts is said on the command line only, in a word of its"
            f" own without ${{...}}: '{COMMAND}=PROGRAM ...'"
        )


def _check_functions(config: RunConfig, words: Sequence[str]) -> None:
    """Refuse rewards of somebody's own that any recipe has named, as their code is run, and those that are nowhere."""
    whole = [word.lstrip("+").partition("=")[0] for word in words if "${" not in word]
    for name, phase in config.phases.items():
        for reward, path in phase.rl.functions.items() if phase.rl else ():
            option = f"phases.{name}.rl.functions.{reward}"
            if option not in whole:
                raise UserError(
                    f"{option} in a recipe is refused: code that a run starts is said on the command line only, in a word of its own"
                    f" without ${{...}}: {option}=MODULE:FUNCTION"
                )
            # Nothing is imported yet; but days later, when the phase begins, it would be too late.
            module = path.partition(":")[0].partition(".")[0]
            if PathFinder.find_spec(module, [*sys.path, os.getcwd()]) is None:
                raise UserError(
                    f"{option}={path}: there is no module {module} in PYTHONPATH or in this folder, {os.getcwd()}: write"
                    f" MODULE:FUNCTION, or add the module's folder to PYTHONPATH"
                )


def _typed(config: DictConfig) -> RunConfig:
    """Return the dataclasses of a composed configuration.

    Raises:
        UserError: for keys that are not in the schema, and for required values that are missing.
    """
    if not config.phases:
        raise UserError(
            f"no recipe: choose one with +recipe=NAME, NAME one of {', '.join(available('recipe'))}"
        )
    faults = [no_such_key(path) for path in unknown_keys(config)]
    faults += [
        f"{key} is required: set it in the recipe or pass {key}=..."
        for key in sorted(OmegaConf.missing_keys(config))
    ]
    if faults:
        raise UserError(*faults)
    # References have no type of their own: the schema sees the values that they stand for.
    values = OmegaConf.to_container(config, resolve=True)
    typed = OmegaConf.merge(OmegaConf.structured(RunConfig), values)
    return cast(RunConfig, OmegaConf.to_object(typed))
