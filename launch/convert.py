"""Hugging Face folders into checkpoints and back; the model is read from config.json.

Commands:
    python launch/convert.py import hf=DIR out=DIR               a folder that init.checkpoint takes
    python launch/convert.py export checkpoint=DIR out=DIR       a folder that transformers loads
    python launch/convert.py adapter checkpoint=DIR out=DIR      a folder that peft loads, or with weights=DIR a merged model

Large models go faster with several processes: torchrun --standalone --nproc-per-node 4 launch/convert.py import hf=DIR out=DIR
Each command's options: python launch/convert.py COMMAND --help. A recipe reads a Hugging Face folder without any of this:
init.huggingface=DIR.
"""

import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    # Started as a file: Python put launch/ first on the path, where data.py would hide any package data.
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root / ".link")

from visionloom.common.errors import UserError, did_you_mean, unknown
from visionloom.common.quiet import quiet_libraries
from visionloom.common.text import one_line, say, warn
from visionloom.launch.environment import check_environment, check_home, world_size
from visionloom.launch.guarding.exit import exit_with
from visionloom.model.huggingface.config import EXPORT_DTYPES, read_config
from visionloom.parallel.config import ParallelConfig
from visionloom.train.old_options import old_option

if TYPE_CHECKING:
    from collections.abc import Iterator

    from visionloom.parallel.topology import Topology

PARALLEL = "parallel."
SIZE = re.compile(r"(\d+(?:\.\d+)?)(MB|GB)")
TRUTHS = {"true": True, "false": False}
UNITS = {"MB": 10**6, "GB": 10**9}
EXPERT_LAYOUTS = ("transformers", "hub")


@dataclass(frozen=True)
class Command:
    """One subcommand: `run` gets its options by name."""

    run: Callable[[dict[str, str]], None]
    required: dict[str, str]
    """What each option means, a line each."""
    optional: dict[str, str]
    parallel: bool = False
    """Whether it takes parallel.* options."""

    def help(self, name: str) -> str:
        """Return the text for `convert.py NAME --help`."""
        known = self.required | {f"[{option}]": text for option, text in self.optional.items()}
        if self.parallel:
            layout = "layout that shares the work; what is written has none"
            known["[parallel.tensor, ...]"] = layout
        usage = " ".join(f"{option}=..." for option in self.required)
        lines = [f"usage: convert.py {name} {usage} [option=value ...]"]
        lines += ["", str(self.run.__doc__), ""]
        lines += [f"  {option + '=':<24} {text}" for option, text in known.items()]
        return "\n".join(lines)

    def options(self, name: str, words: Sequence[str]) -> dict[str, str]:
        """Read the options of a command line; UserError for what the command does not know or needs."""
        given = dict[str, str]()
        for word in words:
            option, equals, value = word.partition("=")
            if not equals or not value:
                raise UserError(f"command line: cannot read '{word}': write option=value")
            self.check_option(name, option)
            check_home(option, value)
            given[option] = value

        missing = [f"{option}=..." for option in self.required if option not in given]
        if missing:
            raise UserError(f"{name} needs {' and '.join(missing)}")
        return given

    def check_option(self, name: str, option: str) -> None:
        """Refuse an option that the command does not know; those of a layout are checked with their values."""
        known = [*self.required, *self.optional]
        is_layout = self.parallel and option.startswith(PARALLEL)
        if option not in known and not is_layout:
            close = did_you_mean(option, known)
            raise UserError(f"{name} has no option {option}{close}: use {', '.join(known)}")


def import_folder(options: dict[str, str]) -> None:
    """Make a checkpoint of a Hugging Face folder; types are kept."""
    folder, parallel = Path(options["hf"]), _layout(options)
    if problems := read_config(folder, "hf").layout_problems(parallel):
        raise UserError(*problems)
    from visionloom.train.agreements import check_folder

    check_folder(folder, "hf")
    with _world(parallel) as (topology, say):
        from visionloom.train.exchange.import_huggingface import import_huggingface

        import_huggingface(folder, Path(options["out"]), topology, say)
        say(f"done: start from it with init.checkpoint={options['out']}", once=True)


def export_folder(options: dict[str, str]) -> None:
    """Make a folder that transformers loads of a checkpoint; several processes share its files."""
    folder, source = Path(options["checkpoint"]), options.get("hf", "")
    _check_choices(options, {"dtype": tuple(EXPORT_DTYPES), "layout": EXPERT_LAYOUTS})
    shard_bytes = _bytes("shard", options.get("shard", "5GB"))
    _check_folders(checkpoint=options["checkpoint"], hf=source or ".")
    companions = Path(source) if source else None
    # Before torch is imported: what does not agree is told in a second.
    from visionloom.train.agreements import check_export

    check_export(folder, companions, "hf")
    with _world(ParallelConfig()) as (topology, say):
        from visionloom.train.exchange.export_huggingface import ExportOptions, export_checkpoint

        dtype, layout = options.get("dtype", ""), options.get("layout", "")
        wanted = ExportOptions(companions, dtype, layout, shard_bytes)
        export_checkpoint(folder, Path(options["out"]), wanted, topology, say)
        say(f"done: {options['out']}", once=True)


def export_adapters(options: dict[str, str]) -> None:
    """Make a folder that peft loads of the adapters in a checkpoint; or, with the weights below them, a merged model."""
    folder, out = Path(options["checkpoint"]), Path(options["out"])
    weights = options.get("weights", "")
    _check_folders(checkpoint=options["checkpoint"], weights=weights or ".")
    from visionloom.train.agreements import check_export

    check_export(folder, Path(weights) if weights else None, "weights")
    with _world(ParallelConfig()) as (topology, say):
        from visionloom.train.exchange.export_adapter import export_adapter, export_merged

        if weights:
            export_merged(folder, Path(weights), out, topology, say)
        elif topology.world_size > 1:
            raise UserError(
                "adapters are small: start this without torchrun, or give weights=DIR to merge them"
            )
        else:
            export_adapter(folder, out, options.get("base", ""), topology, say)
        say(f"done: {out}", once=True)


COMMANDS = {
    "import": Command(
        import_folder,
        {
            "hf": "folder of a Hugging Face model: config.json and safetensors",
            "out": "checkpoint folder to make",
        },
        {},
        parallel=True,
    ),
    "export": Command(
        export_folder,
        {
            "checkpoint": "checkpoint folder, as checkpoints/<phase>/step-00000100",
            "out": "folder to make",
        },
        {
            "hf": "folder that tokenizer, chat template, preprocessor and config.json go along from; else the weights' own",
            "dtype": f"{', '.join(EXPORT_DTYPES)}; else as in the checkpoint",
            "layout": "of experts: hub, as published, which transformers 4.57 and 5 read, or transformers; else hub where possible",
            "shard": "most bytes of one file: 5GB",
        },
    ),
    "adapter": Command(
        export_adapters,
        {"checkpoint": "checkpoint folder of a run with lora", "out": "folder to make"},
        {
            "base": "name or folder of the model that the adapters are for; else the Hugging Face folder that the run began with",
            "weights": "checkpoint or Hugging Face folder that the adapters were trained on: write both merged, for transformers",
        },
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    That is 0, or 1 if the machine is at fault; a user's error exits with 2 (one line each).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        say(__doc__)
        return 0
    try:
        check_environment()
    except UserError as error:
        exit_with(error)

    name, *others = words
    try:
        if name not in COMMANDS:
            close = did_you_mean(name, COMMANDS)
            raise UserError(f"no such command: {name}{close}: use one of {', '.join(COMMANDS)}")
        command = COMMANDS[name]
        if {"-h", "--help"} & set(others):
            say(command.help(name))
            return 0
        options = command.options(name, others)
    except UserError as error:
        # All ranks have the same words: one of them speaks.
        exit_with(error, everywhere=True)
    return _run(command, options)


def _run(command: Command, options: dict[str, str]) -> int:
    quiet_libraries()
    try:
        command.run(options)
    except UserError as error:
        exit_with(error)
    except OSError as error:
        warn(f"error: {one_line(str(error))}")
        return 1
    return 0


def _check_choices(options: dict[str, str], choices: dict[str, tuple[str, ...]]) -> None:
    """Refuse options whose values are not among their choices."""
    for option, known in choices.items():
        if option in options and options[option] not in known:
            raise UserError(unknown(option, options[option], known))


def _check_folders(**paths: str) -> None:
    """Refuse options that should name a folder and do not."""
    for option, path in paths.items():
        if not Path(path).is_dir():
            raise UserError(f"{option}={path} is not a folder: correct the option")


def _layout(options: dict[str, str]) -> ParallelConfig:
    """Return the layout that parallel.* options name."""
    config, hints = ParallelConfig(), typing.get_type_hints(ParallelConfig)
    for option, value in options.items():
        name = option.removeprefix(PARALLEL)
        if option == name:
            continue
        if name not in hints and (line := old_option(option)):
            raise UserError(line)
        if name not in hints:
            raise UserError(f"no such key: {option}{did_you_mean(name, list(hints))}")
        setattr(config, name, _typed(option, value, hints[name]))
    if problems := config.all_problems(world_size()):
        raise UserError(*problems)
    return config


def _typed(option: str, value: str, hint: Any) -> Any:
    """Return an option's value as its type in the schema wants it."""
    kinds = typing.get_args(hint) or (hint,)
    if types.NoneType in kinds and value == "null":
        return None
    if str in kinds:
        return value
    if bool in kinds:
        if value not in TRUTHS:
            raise UserError(f"{option}={value} must be true or false")
        return TRUTHS[value]
    # 18 digits fit 64 bits; the bounds of the option come after.
    if not re.fullmatch(r"[+-]?\d{1,18}", value):
        raise UserError(f"{option}={value} must be a whole number")
    return int(value)


@contextmanager
def _world(parallel: ParallelConfig) -> "Iterator[tuple[Topology, Any]]":
    """Open the ranks of this command on CPUs; yields the topology and what prints a rank's progress."""
    import torch

    from visionloom.parallel import topology as topologies

    # 0: the cores divided by the ranks here, or each rank would take all of them.
    topologies.set_threads(0)
    topology = topologies.start(parallel, torch.device("cpu"))

    def tell(text: str, once: bool = False) -> None:
        if topology.is_main or not once:
            say(text if once or topology.world_size == 1 else f"rank {topology.rank}: {text}")

    # Not closed after an error: other ranks may be in a collective, and torchrun ends them.
    yield topology, tell
    topologies.stop()


def _bytes(option: str, value: str) -> int:
    match = SIZE.fullmatch(value)
    if match is None or not float(match[1]):
        raise UserError(f"{option}={value} is not a size: write 500MB or 5GB")
    return int(float(match[1]) * UNITS[match[2]])


if __name__ == "__main__":
    sys.exit(main())
