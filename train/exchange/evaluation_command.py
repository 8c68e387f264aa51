"""Evaluate by a command of the user's: a checkpoint is exported, the command reads it, and its numbers are read back."""

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from visionloom.common.command import last_lines, run_program
from visionloom.common.errors import UserError
from visionloom.common.jsonfile import JsonError, load_json
from visionloom.common.places import PlaceError, read_located
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.read import Checkpoint
from visionloom.train.config import COMMAND, COMMAND_WORDS, RunConfig
from visionloom.train.exchange.export_adapter import export_merged
from visionloom.train.exchange.export_huggingface import ExportOptions, export_checkpoint

FOLDER: Final = "evaluation"
"""In a run's folder: exports, and what commands leave."""
LARGEST: Final = 1 << 26
"""Bytes of a JSON file of results: 64 MiB."""
MOST_FILES: Final = 1000
MOST_NUMBERS: Final = 10_000
LONGEST_NAME: Final = 300
"""Characters."""


@dataclass(frozen=True)
class EvaluationCommand:
    """The files of one command that evaluates one checkpoint."""

    command: str
    """As evaluation.command."""
    folder: Path
    """That of all commands of the run."""
    step: int
    """Of the checkpoint."""

    @property
    def model(self) -> Path:
        """Return the exported folder."""
        return self.folder / f"model-step-{self.step}"

    @property
    def results(self) -> Path:
        """Return the folder that the command writes into."""
        return self.folder / f"results-step-{self.step}"

    @property
    def log(self) -> Path:
        """Return the file of the command's output."""
        return self.folder / f"command-step-{self.step}.log"

    @property
    def words(self) -> list[str]:
        """Return the program and its arguments."""
        # Split first: a folder with a space in its name is still one argument.
        words = shlex.split(self.command)
        for name, folder in zip(COMMAND_WORDS, (self.model, self.results), strict=True):
            words = [word.replace(name, str(folder.absolute())) for word in words]
        return words

    def clear(self) -> None:
        """Make the folder, with an empty one for results, and remove what an earlier command left of this step.

        Raises:
            UserError: if the folder is a link, which would have files elsewhere removed, or cannot be made.
        """
        if self.folder.is_symlink():
            raise UserError(f"{COMMAND}: {self.folder} is a link: remove it")
        try:
            for left in (self.model, self.results):
                shutil.rmtree(left, ignore_errors=True)
            self.log.unlink(missing_ok=True)
            self.results.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{COMMAND}: {self.results} cannot be made: {error.strerror}") from None

    def run(self, seconds: float) -> dict[str, float]:
        """Run the command for at most `seconds` on the exported model, which is removed then; returns its numbers by name.

        Raises:
            UserError: if it cannot be started, fails, takes longer, or leaves no numbers.
        """
        try:
            code = run_program(self.words, self.log, seconds)
        except (OSError, ValueError) as error:  # ValueError: a NUL character in a word
            raise UserError(f"{COMMAND} cannot be started: {error}") from None
        finally:
            # As large as a checkpoint's weights, and made again from it at any time.
            shutil.rmtree(self.model, ignore_errors=True)
        numbers = numbers_in(self.results) if code == 0 else {}
        if not numbers:
            fault = self.fault(code, seconds)
            raise UserError(
                f"{COMMAND} {fault}; its output, {self.log}, ends: {last_lines(self.log)}"
            )
        return numbers

    def fault(self, code: int | None, seconds: float) -> str:
        """Return what is wrong with a command that has ended so, without numbers."""
        if code is None:
            return f"did not end within {seconds / 60:g} min: raise {COMMAND}_minutes"
        if code < 0:
            return f"was ended by signal {-code}"
        if code > 0:
            return f"ended with exit code {code}"
        return f"left no number in a JSON file below {self.results}"


def export_for_command(
    config: RunConfig,
    trained: Checkpoint,
    folder: Path,
    topology: Topology,
    say: Callable[[str], None],
) -> EvaluationCommand:
    """Export a checkpoint for evaluation.command, with adapters merged; all ranks call it together.

    Args:
        config: of the run.
        trained: the checkpoint.
        folder: of the run.
        topology: of any layout.
        say: receives news.

    Raises:
        UserError: if the checkpoint cannot be exported.
    """
    step = trained.run_state.step
    command = EvaluationCommand(config.evaluation.command, folder / FOLDER, step)
    topology.on_main(command.clear)
    say(f"exporting step {step} for {COMMAND}")
    if trained.run_state.lora:
        weights = Path(config.init.huggingface or config.init.checkpoint)
        export_merged(trained.folder, weights, command.model, topology, say)
    else:
        export_checkpoint(trained.folder, command.model, ExportOptions(), topology, say)
    return command


def numbers_in(folder: Path) -> dict[str, float]:
    """Return the finite numbers of all JSON files below a folder, by dotted names.

    Of a file with a section `results`, as lmms-eval writes it, only those in it. A name that two files have stands for the number
    of the later one in the order of paths. Files that are no JSON, too large, or links out of the folder are passed over.
    """
    numbers: dict[str, float] = {}
    for path in islice(sorted(folder.rglob("*.json")), MOST_FILES):
        try:
            content = read_located(folder, str(path.relative_to(folder)), LARGEST)
            # Not only finite ones: lmms-eval writes NaN where it has no error of a mean.
            document = load_json(content, str(path), finite=False)
        except (PlaceError, JsonError, OSError):
            continue
        numbers.update(numbers_of(document))
    return dict(islice(numbers.items(), MOST_NUMBERS))


def numbers_of(document: Any) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a JSON document's objects by their dotted names; lists, which hold single samples, are left out."""
    if isinstance(document, dict) and isinstance(document.get("results"), dict):
        document = {"results": document["results"]}
    left: list[tuple[str, Any]] = [("", document)]
    while left:
        name, value = left.pop()
        if isinstance(value, dict) and len(name) <= LONGEST_NAME:
            # A stack and not a recursion: depth is a stranger's.
            prefix = f"{name}." if name else ""
            below = []
            for key, each in value.items():
                below.append((prefix + key, each))
            left += reversed(below)
        # A whole number may be too large for a float; NaN is in no range.
        elif (
            is_number(value) and abs(value) <= sys.float_info.max and 0 < len(name) <= LONGEST_NAME
        ):
            yield name, float(value)


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
