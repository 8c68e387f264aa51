"""The words of launch/submit.py itself, apart from those of the run that it submits."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from visionloom.common.errors import UserError
from visionloom.common.settings import option
from visionloom.common.text import one_line
from visionloom.forecast.machine import machine_names
from visionloom.launch.own_words import take_words

FLAGS: Final = ("--dry-run", "--chain", "--array", "--torchrun")
NODES_OF: Final = re.compile(r"nodes\.([^=]+)=(.*)", re.DOTALL)
MOST_NODES: Final = 1 << 16
TIME: Final = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
SEEDS: Final = re.compile(r"\d{1,18}(,\d{1,18})*")


@dataclass
class SubmitWords:
    """How a run is submitted, and to whom."""

    nodes: int = option(0, "free", least=0, most=MOST_NODES)
    """Machines of the run; it must be given."""
    gpus_per_node: int = option(8, "free", least=1, most=1024)
    """GPUs of each, a rank on each GPU."""
    time: str = option("", "free")
    """Time limit of a job, as SLURM writes it: minutes, h:mm:ss or d-hh:mm:ss; empty: the partition's."""
    partition: str = option("", "free")
    account: str = option("", "free")
    cpus_per_task: int = option(0, "free", least=0, most=4096)
    """Cores of a node for its ranks and their data workers; 0: as SLURM gives them."""
    sbatch: str = option("", "free")
    """More options of sbatch, as it takes them: `--qos=long --exclude=n7`."""
    warn: int = option(300, "free", least=10, most=65_535)
    """Seconds before the time limit at which the run is asked to stop; it must be enough for a step and a checkpoint."""
    restarts: int = option(3, "free", least=0, most=1000)
    """How often torchrun starts the ranks anew in the same job."""
    program: str = option("launch/pretrain.py", "free")
    """What the ranks run: launch/pretrain.py, launch/finetune.py or a script of your own, with its first arguments."""
    python: str = option("", "free")
    """Python of the ranks; empty: the one that submits, and with container or setup `python`."""
    setup: str = option("", "free")
    """File of shell lines for the script, such as `module load`."""
    container: str = option("", "free")
    """Image that the ranks run in: a .sif file (Apptainer), or what srun --container-image takes (Pyxis)."""
    mounts: str = option("", "free")
    """Folders that the container sees too, parted by commas; the working folder and the run's are among them."""
    template: str = option("", "free")
    """Script to fill in; empty: launch/submitting/slurm.sh."""
    plan: bool = option(True, "free")
    """Plan the run before it is submitted, in up to a minute a job, and refuse what does not fit."""
    gpu: str = option("h100", "free")
    """File of recipes/gpu for that plan."""
    seeds: str = option("", "free")
    """With --array: seeds of the runs, parted by commas."""
    host: str = option("HOST", "free")
    """With --torchrun: name or address of the first machine."""
    port: int = option(29_500, "free", least=1024, most=65_535)
    """With --torchrun: a free port there."""


@dataclass
class Order:
    """What a command line asks for."""

    own: SubmitWords = field(default_factory=SubmitWords)
    words: list[str] = field(default_factory=list)
    """Of the run."""
    flags: set[str] = field(default_factory=set)
    nodes_of: dict[str, int] = field(default_factory=dict)
    """Machines of phases that have other numbers."""

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of an array; empty without one."""
        return [int(seed) for seed in self.own.seeds.split(",")] if self.own.seeds else []

    def problems(self) -> list[str]:
        """Return a line for each thing that is missing, or that has no effect."""
        own, lines = self.own, list[str]()
        if not own.nodes:
            lines.append("nodes is missing: say how many machines the run has, nodes=N")
        if own.gpu not in machine_names():
            lines.append(f"gpu={one_line(own.gpu)}: use one of {', '.join(machine_names())}")
        if self.nodes_of and "--chain" not in self.flags:
            lines.append("nodes.PHASE=N is for --chain, where each phase is a job of its own")
        if "--torchrun" in self.flags and {"--chain", "--array"} & self.flags:
            lines.append("--torchrun prints the command of one run: leave --chain and --array out")
        if 0 < _seconds(own.time) <= own.warn:
            said = f"time={own.time} is not above warn={own.warn} seconds"
            lines.append(
                f"{said}: the run would be stopped as it begins; set more time or less warn"
            )
        return lines + _unreadable(own) + self._array_problems()

    def _array_problems(self) -> list[str]:
        seeds = self.own.seeds
        if ("--array" in self.flags) != bool(seeds):
            return ["an array has seeds: write both, --array seeds=0,1,2, or neither"]
        if seeds and not SEEDS.fullmatch(seeds):
            return [f"seeds={one_line(seeds)}: write whole numbers, seeds=0,1,2"]
        return []


def read_order(argv: Sequence[str]) -> Order:
    """Read the command line; UserError with a line for each word that is missing or wrong."""
    order = Order(flags=set(argv) & set(FLAGS))
    words = [word for word in argv if word not in FLAGS]
    # Their names are those of phases, so that no dataclass has them.
    faults = _take_nodes(order, words)
    wrong, order.words = take_words(
        order.own, [word for word in words if not NODES_OF.fullmatch(word)]
    )
    if faults := faults + wrong + _unprintable(order.own) or order.problems():
        raise UserError(*faults)
    return order


def _take_nodes(order: Order, words: Sequence[str]) -> list[str]:
    """Take the words nodes.PHASE=N; returns a line for each that is wrong."""
    faults = []
    for word in words:
        if of_phase := NODES_OF.fullmatch(word):
            phase, number = of_phase.groups()
            if re.fullmatch(r"[1-9]\d{0,4}", number):
                order.nodes_of[phase] = int(number)
            else:
                faults.append(f"{one_line(word)} is not a whole number: write nodes.{phase}=N")
    return faults


def _seconds(time: str) -> int:
    """Return the seconds of a time limit: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 if there is none, or it is written in another way."""
    parts = TIME.fullmatch(time)
    if parts is None:
        return 0
    days, *rest = (int(part or 0) for part in parts.groups())
    # Minutes come first where there are neither days nor three numbers.
    is_short = parts[1] is None and parts[4] is None
    hours, minutes, seconds = (0, *rest[:2]) if is_short else rest
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _unreadable(own: SubmitWords) -> list[str]:
    """Return a line for each text of several words that a shell could not part."""
    lines = []
    for name in ("program", "sbatch"):
        text = getattr(own, name)
        try:
            parts = shlex.split(text)
        except ValueError as error:
            reason = str(error).lower()
            lines.append(f"{name}={one_line(text)} has {reason}: close it, or write \\ before it")
        else:
            if name == "program" and not parts:
                lines.append("program is empty: name a file, program=launch/pretrain.py")
    return lines


def _unprintable(own: SubmitWords) -> list[str]:
    """Return a line for each text that has another line in it: in a script that would be a line of its own."""
    return [
        f"{name}={one_line(value)} has signs that are no text: write it anew"
        for name, value in vars(own).items()
        if isinstance(value, str) and not value.isprintable()
    ]
