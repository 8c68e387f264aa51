"""Submit a run to SLURM: checked and planned first, from one script that can be read and changed.

    python launch/submit.py +recipe=NAME nodes=N [word=value ...] [key=value ...]
    python launch/submit.py +recipe=NAME nodes=N --dry-run                                   the script, and nothing submitted
    python launch/submit.py +recipe=NAME nodes=N --chain [nodes.PHASE=N]                     each phase a job of its own
    python launch/submit.py +recipe=NAME nodes=N --array seeds=0,1,2                         a run for each seed
    python launch/submit.py +recipe=NAME nodes=N --torchrun host=ADDRESS                     the command without SLURM

docs/slurm.md has all words, and what happens at a time limit, a preemption, scancel and the loss of a node.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

if not __package__:
    # Started as a file: Python put launch/ first on the path, where data.py would hide any package data.
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root / ".link")

from visionloom.common.errors import UserError
from visionloom.common.quiet import quiet_libraries
from visionloom.common.text import one_line, say
from visionloom.launch.guarding.exit import code_of
from visionloom.launch.submitting import records
from visionloom.launch.submitting.jobs import SubmittedJob, checked_jobs
from visionloom.launch.submitting.script import script_of, torchrun_command
from visionloom.launch.submitting.words import Order, read_order

HELP: Final = """usage: submit.py +recipe=NAME nodes=N [word=value ...] [key=value ...] [--dry-run | --torchrun] [--chain] [--array]

A run on SLURM. The recipe is composed and checked for nodes x gpus_per_node ranks and planned, then one
script is written into the run's folder and submitted.

words:
  nodes=N             machines of the run
  gpus_per_node=N     ranks on each (8)
  time= partition= account= cpus_per_task=   as sbatch takes them
  sbatch='--qos=long --exclude=n7'           more options of sbatch
  warn=SECONDS        before the time limit the run saves and is requeued (300)
  restarts=N          starts of the ranks anew in one job (3)
  program=FILE        launch/pretrain.py, or launch/finetune.py, or your own
  setup=FILE          shell lines for the script: module load, source .../activate
  container=IMAGE     a .sif file (Apptainer) or an image (Pyxis); mounts=DIR,DIR
  python=PROGRAM      Python of the ranks
  template=FILE       your own script, a copy of launch/submitting/slurm.sh
  plan=false          submit without a plan; gpu=NAME: the card to plan for (h100)
key=value             options of the run, as launch/pretrain.py takes them

--dry-run             print the script, write and submit nothing
--chain               each phase a job, the next after the last; nodes.PHASE=N: other numbers of machines
--array seeds=0,1,2   a run for each seed, in folders of their own
--torchrun            print the command without SLURM; host=ADDRESS of the first machine, port=N

Exit code 0: submitted. 2: a word is wrong, the run cannot work on these machines, or sbatch refuses it.
"""
SBATCH_SECONDS: Final = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; a user's error exits with 2, one line each."""
    quiet_libraries()
    words = list(sys.argv[1:] if arguments is None else arguments)
    return code_of(lambda: run(words))


def run(argv: list[str]) -> int:
    """Do what the command line says and return the exit code."""
    if not argv or {"--help", "-h"} & set(argv):
        say(HELP.rstrip())
        return 0
    order = read_order(argv)
    jobs = checked_jobs(order)
    # Where there is no scheduler, no job asks for a record of what it was given.
    if "--torchrun" in order.flags:
        say(torchrun_command(order, jobs[0]))
        return 0

    return hand_over(order, jobs)


def hand_over(order: Order, jobs: list[SubmittedJob]) -> int:
    """Make the scripts; write and submit them, or only show them."""
    # The place is named in the scripts, and made only for those that are submitted.
    folder = records.new_folder(Path(jobs[0].config.run.folder).absolute())
    scripts = {job.name: script_of(order, job, folder / records.LOG) for job in jobs}
    if "--dry-run" in order.flags:
        say(*scripts.values())
        return 0
    records.write(folder, jobs, scripts)
    submit(order, jobs, folder)
    return 0


def submit(order: Order, jobs: list[SubmittedJob], folder: Path) -> None:
    """Hand the scripts to sbatch, each but the first to begin after the one before it, and say what to do next."""
    numbers = [""]
    # Of an array each task waits for the task with its seed.
    dependency = "aftercorr" if order.seeds else "afterok"
    for job in jobs:
        script = folder / f"{job.name}.sh"
        try:
            numbers.append(sbatch(script, numbers[-1], dependency))
        except UserError as error:
            queued = " ".join(numbers[1:])
            more = [f"the jobs before it are in the queue; end them: scancel {queued}"]
            raise UserError(*error.lines, *(more if queued else [])) from error
        ranks = f"{job.nodes} x {order.own.gpus_per_node}"
        say(f"job {numbers[-1]}: {job.name} on {ranks}, {script}")
    _say_what_is_next(order, jobs[0].config.run.folder, folder, " ".join(numbers[1:]))


def _say_what_is_next(order: Order, run_folder: str, folder: Path, numbers: str) -> None:
    if order.seeds:
        run_folder += f"-seed{order.seeds[0]}"
    say(f"what it prints: {folder}/*.log; how it stands: {run_folder}/status.json")
    say(f"end it: scancel {numbers}; end it after its step, saved: touch {run_folder}/stop")


def sbatch(script: Path, before: str, dependency: str) -> str:
    """Submit a script, to begin when the job `before` has ended well, and return its number; UserError with SLURM's words."""
    command = ["sbatch", "--parsable", str(script)]
    if before:
        # A job that can never begin leaves the queue.
        command[2:2] = [f"--dependency={dependency}:{before}", "--kill-on-invalid-dep=yes"]
    done = _answer(command, script)
    if done.returncode:
        reason = one_line(done.stderr.strip().removeprefix("sbatch: error: "))
        raise UserError(f"sbatch refuses {script}: {reason}")
    # With several clusters the name of one stands behind the number.
    return done.stdout.strip().partition(";")[0]


def _answer(command: list[str], script: Path) -> subprocess.CompletedProcess[str]:
    """Run sbatch; UserError if it is not there, or SLURM does not answer it."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SBATCH_SECONDS)
    except FileNotFoundError:
        raise UserError(
            "sbatch is not found: submit from a machine of the cluster, or start the run without SLURM, --torchrun"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"sbatch does not answer: see squeue, and submit {script} later") from None


if __name__ == "__main__":
    sys.exit(main())
