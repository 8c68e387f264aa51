"""The batch script of a job: a template whose names in double braces are filled in."""

import re
import shlex
import sys
from importlib.resources import files
from pathlib import Path
from typing import Final

from visionloom.common.errors import UserError
from visionloom.launch.submitting.jobs import CHECKOUT, SubmittedJob
from visionloom.launch.submitting.words import Order

PLACE: Final = re.compile(r"\{\{(\w+)\}\}")
NEEDED: Final = ("run", "command")
"""Names that a template cannot do without: it would train nothing, or not know how it ended."""


def script_of(order: Order, job: SubmittedJob, log: Path) -> str:
    """Return the script of a job, which writes what it prints to `log`.

    Raises:
        UserError: for a template that cannot be read, has unknown names, or lacks one that is needed.
    """
    values = _values(order, job, log)
    text = _template(order.own.template)
    names = set(PLACE.findall(text))
    option = f"template={order.own.template}"
    for name in sorted(names - set(values)):
        known = ", ".join(sorted(values))
        raise UserError(f"{option} has {{{{{name}}}}}, which nothing fills in: use some of {known}")
    for name in NEEDED:
        if name not in names:
            raise UserError(f"{option} lacks {{{{{name}}}}}: see launch/submitting/slurm.sh")
    return PLACE.sub(lambda match: values[match[1]], text)


def torchrun_command(order: Order, job: SubmittedJob) -> str:
    """Return the command that starts the run without a scheduler, the same on each machine."""
    own = order.own
    options = [
        f"--nnodes={job.nodes}",
        f"--nproc-per-node={own.gpus_per_node}",
        f"--max-restarts={own.restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-id={job.config.run.name}",
        f"--rdzv-endpoint={own.host}:{own.port}",
    ]
    agent = shlex.join([_python(order), "-m", "torch.distributed.run", *options])
    return f"{agent} {job.command(order)}"


def _values(order: Order, job: SubmittedJob, log: Path) -> dict[str, str]:
    """Return what takes the place of each name, written for a shell."""
    own = order.own
    return {
        "name": job.name,
        "nodes": str(job.nodes),
        "gpus_per_node": str(own.gpus_per_node),
        "here": shlex.quote(str(Path.cwd())),
        "log": shlex.quote(str(log.absolute())),
        "warn": str(own.warn),
        "sbatch": "\n".join(f"#SBATCH {line}" for line in _sbatch_options(order)),
        **_run_values(order, job),
        **_container(order, job),
    }


def _run_values(order: Order, job: SubmittedJob) -> dict[str, str]:
    """Return the values that say what the ranks run."""
    own, seeds = order.own, ""
    # A task has the number of its seed's place: seeds may be larger than a cluster's numbers of tasks.
    if order.seeds:
        listed = " ".join(map(str, order.seeds))
        seeds = f"SEEDS=({listed})\nSEED=${{SEEDS[$SLURM_ARRAY_TASK_ID]}}"
    return {
        "seeds": seeds,
        "run": job.folder(order),
        "command": job.command(order),
        "setup": _text(own.setup, "setup") if own.setup else "",
        "python": shlex.quote(_python(order)),
        "restarts": str(own.restarts),
    }


def _sbatch_options(order: Order) -> list[str]:
    own = order.own
    lines = [
        f"--{name.replace('_', '-')}={shlex.quote(str(value))}"
        for name in ("time", "partition", "account", "cpus_per_task")
        if (value := getattr(own, name))
    ]
    if order.seeds:
        lines.append(f"--array=0-{len(order.seeds) - 1}")
    return lines + [shlex.quote(word) for word in shlex.split(own.sbatch)]


def _container(order: Order, job: SubmittedJob) -> dict[str, str]:
    """Return the options of srun and the words before the agent that bring it into a container."""
    own, values = order.own, {"srun": "", "container": ""}
    image, mounts = shlex.quote(own.container), _mounts(order, job)
    if own.container.endswith(".sif"):
        binds, here = shlex.quote(",".join(mounts)), shlex.quote(mounts[0])
        values["container"] = f"apptainer exec --nv --pwd {here} --bind {binds} {image}"
    elif own.container:
        # Pyxis wants both sides of each.
        pairs = [each if ":" in each else f"{each}:{each}" for each in mounts]
        both = shlex.quote(",".join(pairs))
        values["srun"] = (
            f"--container-image={image} --container-mounts={both} --container-workdir={shlex.quote(mounts[0])}"
        )
    return values


def _mounts(order: Order, job: SubmittedJob) -> list[str]:
    """Return the folders that a container sees, the working folder first."""
    # A run's folder may lie elsewhere, as the words of the run may name any.
    beside = str(Path(job.config.run.folder).absolute().parent)
    more = [each for each in order.own.mounts.split(",") if each]
    return list(dict.fromkeys([str(Path.cwd()), beside, str(CHECKOUT), *more]))


def _python(order: Order) -> str:
    own = order.own
    # A container has none of this machine's files, and what is loaded has a Python of its own.
    return own.python or ("python" if own.container or own.setup else sys.executable)


def _template(name: str) -> str:
    if name:
        return _text(name, "template")
    return files("visionloom.launch.submitting").joinpath("slurm.sh").read_text()


def _text(name: str, option: str) -> str:
    # The template is the whole script, what is set up a part of it.
    try:
        return Path(name).read_text().rstrip("\n") + ("\n" if option == "template" else "")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"{option}={name} cannot be read: {reason}") from error
