"""The words of launch/plan.py itself, apart from those of the run that it plans."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from visionloom.common.errors import UserError, unknown
from visionloom.common.settings import option
from visionloom.forecast.machine import machine, machine_names
from visionloom.forecast.request import PlanRequest
from visionloom.launch.own_words import take_words
from visionloom.train.config import RunConfig

MOST_GPUS: Final = 1 << 20


@dataclass
class PlanWords:
    """The GPUs to plan for, and what is planned on them."""

    world: int = option(1, "free", least=1, most=MOST_GPUS)
    """GPUs of the run, a rank on each; it must be given."""
    gpu: str = option("h100", "free")
    """File of recipes/gpu."""
    memory: float | None = option(None, "free", above=0, most=4096)
    """GiB of each card; None: as the file says."""
    imbalance: float = option(1.0, "free", least=1, most=1024)
    """Tokens of a mixture's busiest rank of experts, as a multiple of the mean."""
    phase: str = option("", "free")
    """Only this phase; empty: all."""
    out: str = option("", "free")
    """Folder of plan.json and plan.html; empty: plan/ in the run's folder."""

    def request(self, config: RunConfig) -> PlanRequest:
        """Return what is to be planned of a run; UserError for a phase that it lacks, or kernels whose speed is not known."""
        card = machine(self.gpu)
        if self.memory is not None:
            card = replace(card, memory_gib=self.memory)
        # Known before a minute of work.
        card.with_attention(config.model.attention, self.gpu)
        phases = tuple(config.phases)
        if self.phase and self.phase not in phases:
            raise UserError(unknown("phase", self.phase, phases))
        if self.phase:
            phases = (self.phase,)
        for name in phases:
            if (config.phases[name].parallel or config.parallel).engine != "megatron":
                raise UserError(
                    f"phase {name} is of parallel.engine=deepspeed, whose steps are not planned: plan it with parallel.engine=megatron,"
                    " and see docs/finetune.md for DeepSpeed's memory"
                )
        return PlanRequest(config, self.world, self.gpu, card, self.imbalance, phases)


def read_plan_words(argv: Sequence[str]) -> tuple[PlanWords, list[str]]:
    """Take the command's own words from the command line; return them, and the words of the run.

    Raises:
        UserError: one line for each word that is missing or wrong; a phase is checked only with the run.
    """
    own = PlanWords()
    faults, others = take_words(own, argv)
    if not any(word.startswith("world=") for word in argv):
        faults.insert(0, "world is missing: say how many GPUs the run has, world=N")
    if own.gpu not in machine_names():
        faults.append(unknown("gpu", own.gpu, machine_names()))
    if faults:
        raise UserError(*faults)
    return own, others
