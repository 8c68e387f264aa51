"""RunConfig: the schema of a whole run. The only file that knows every configuration.

YAML holds values, the dataclasses hold names, types and defaults. Nothing here imports torch, so that a wrong value is
refused in well under a second.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from visionloom.common.errors import unknown
from visionloom.common.names import name_fault
from visionloom.common.settings import ENTRIES, option, option_faults
from visionloom.common.text import one_line
from visionloom.data.config import DataConfig
from visionloom.model.config import GROUPS, ModelConfig
from visionloom.model.lora_config import LoraConfig
from visionloom.parallel.config import ParallelConfig

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
ANY_PHASE = "phases.<name>"
LOSSES = ("sqrt", "token", "sample")
SCHEDULES = ("cosine", "wsd", "linear", "constant")
LATEST = "latest"
"""File beside the phases' folders of checkpoints that names the newest one."""
STEPS = 10**7
"""Most optimizer steps of a phase; the folders of checkpoints have eight digits."""


@dataclass
class RunSection:
    """Identity of the run and where it lives."""

    name: str = option("???", "free")
    folder: str = option("", "free")
    """Run folder; empty: runs/<name>."""
    seed: int = option(1234, "data", least=0, most=2**62)
    device: str = option("auto", "free", choices=DEVICES)
    """`cpu` (gloo), `cuda` (NCCL), or `auto`: cuda where a GPU is visible."""
    precision: str = option("auto", "run", choices=PRECISIONS)
    """Arithmetic of the model: `fp32`, `bf16`, or `auto`: bf16 on a GPU, fp32 on a CPU."""
    threads: int = option(0, "free", least=0, most=1024)
    """CPU threads of each rank; 0: the cores divided by the ranks of this machine."""
    deterministic: bool = option(False, "free")
    """Only kernels whose sums have a fixed order: the same run twice gives the same bits; slower on a GPU."""
    evaluate_at_end: bool = option(False, "free")
    """Evaluate on data.validation when the last phase is done."""
    start_anew: bool = option(False, "free")
    """Begin at step 0 where no checkpoint of the run is whole any more; what is left of them and the metrics is moved aside."""
    on_change: str = option("error", "free", choices=("error", "continue"))
    """If settings of the phase in progress or of the whole run differ from a checkpoint's: `error` says which, `continue` goes
    on with the new ones and says which. What is read has data.on_change."""


@dataclass
class InitConfig:
    """Where the first phase's weights come from; both empty: random from run.seed."""

    huggingface: str = option("", "run")
    """Folder of a Hugging Face model."""
    checkpoint: str = option("", "run")
    """Checkpoint folder of this or another run (weights only)."""


@dataclass
class OptimConfig:
    """AdamW and gradient clipping."""

    name: str = option("adamw", "never", choices=("adamw",))
    beta1: float = option(0.9, "run", least=0, below=1)
    beta2: float = option(0.95, "run", least=0, below=1)
    epsilon: float = option(1e-8, "run", above=0, most=1)
    weight_decay: float = option(0.05, "run", least=0, most=100)
    clip_grad: float = option(1.0, "run", least=0, most=1e9)
    """Largest global gradient norm; 0 turns clipping off."""


@dataclass
class PhaseConfig:
    """One phase: what trains, on what, for how long."""

    sequence_length: int = option(8192, "data", least=1, most=2**24)
    """Tokens of one pack."""
    global_batch: int = option(1, "data", least=1, most=2**20)
    """Packs of one optimizer step over all ranks."""
    micro_batch: int = option(1, "free", least=1, most=2**20)
    """Packs of one forward pass on one rank."""
    steps: int | None = option(None, "run", least=1, most=STEPS)
    """Optimizer steps; or give `tokens`."""
    tokens: int | None = option(None, "run", least=1, most=10**18)
    """Tokens including padding; the steps follow from sequence_length x global_batch."""
    trainable: list[str] = option(list(GROUPS), "run", choices=GROUPS)
    """Parameter groups that train: vision, merger (main and DeepStack mergers), language."""
    fresh: list[str] = option([], "run", choices=GROUPS)
    """Parameter groups drawn anew at the start, as the report's alignment starts from new mergers."""
    mixture: dict[str, float] = option({}, "data", least=0, most=1e9)
    """Weight of each dataset; empty: all of data.datasets with their own weights."""
    loss: str = option("sqrt", "run", choices=LOSSES)
    """Weight of a token in a sample with n supervised tokens: `sqrt` n^-1/2, `token` 1, `sample` 1/n."""
    lr: float = option(1e-4, "run", least=0, most=100)
    """Peak learning rate."""
    lr_vision: float | None = option(None, "run", least=0, most=100)
    """Peak learning rate of the vision tower; None: lr."""
    lr_merger: float | None = option(None, "run", least=0, most=100)
    """Peak learning rate of the mergers; None: lr."""
    lr_min_ratio: float = option(0.1, "run", least=0, most=1)
    """Last learning rate as a share of the peak."""
    warmup_steps: int = option(0, "run", least=0, most=STEPS)
    schedule: str = option("cosine", "run", choices=SCHEDULES)
    """`cosine` or `linear` decay over the whole phase, `wsd` (constant, then decay_steps down), `constant`."""
    decay_steps: int | None = option(None, "run", least=1, most=STEPS)
    """Steps of decay at the end of a `wsd` schedule; None: a tenth of the phase."""
    parallel: ParallelConfig | None = None
    """A layout of its own; None: the run's."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the phase."""
        if self.steps is not None:
            return self.steps
        return -(-(self.tokens or 0) // (self.sequence_length * self.global_batch))

    def peak_learning_rates(self) -> dict[str, float]:
        """Peak learning rate of each trainable parameter group."""
        own = {"vision": self.lr_vision, "merger": self.lr_merger, "language": None}
        return {group: rate if (rate := own[group]) is not None else self.lr for group in self.trainable}

    def problems(
        self,
        where: str,
        datasets: list[str],
        world_size: int,
        parallel: ParallelConfig,
        model: ModelConfig,
        dealt: bool = True,
    ) -> list[str]:
        """What is wrong with this phase: one line a fault, each naming its option; empty if none.

        Whether its packs can be dealt to the ranks is left out unless `dealt`: the run's layout must be possible first.
        """
        if found := option_faults(self, where):
            return found
        if (self.steps is None) == (self.tokens is None):
            found.append(f"{where}: give exactly one of steps and tokens")
        elif self.total_steps > STEPS:
            found.append(f"{where}.tokens={self.tokens} makes {self.total_steps:,} steps, at most {STEPS:,} are possible")
        elif self.warmup_steps >= self.total_steps:
            found.append(f"{where}.warmup_steps={self.warmup_steps} must be below the phase's {self.total_steps} steps")
        if self.decay_steps is not None and self.decay_steps > self.total_steps - self.warmup_steps:
            found.append(f"{where}.decay_steps={self.decay_steps} must fit behind the warm-up")
        found += [unknown(f"{where}.mixture", name, datasets) for name in self.mixture if name not in datasets]
        if not self.trainable:
            found.append(f"{where}.trainable is empty: name at least one of {', '.join(GROUPS)}")
        if self.mixture and sum(self.mixture.values()) <= 0:
            found.append(f"{where}.mixture: one weight must be above 0")
        layout = self.parallel or parallel
        faults = layout.problems(world_size) or model.layout_problems(layout)
        if self.parallel is not None:
            found += [f"{where}: {fault}" for fault in faults]
        if dealt and not found and not faults:
            found += self._dealing_problems(where, world_size, layout)
        return found

    def _dealing_problems(self, where: str, world_size: int, layout: ParallelConfig) -> list[str]:
        """Why the packs of a step, or the tokens of a pack, cannot be dealt to the ranks of a layout that is possible."""
        found = []
        packs = layout.data_parallel_size(world_size) * self.micro_batch
        if self.global_batch % packs:
            found.append(
                f"{where}.global_batch={self.global_batch} packs cannot be dealt to"
                f" {layout.data_parallel_size(world_size)} data-parallel ranks x micro_batch {self.micro_batch}:"
                f" make it a multiple of {packs} or start fewer ranks"
            )
        elif layout.chunks > 1 and self.global_batch // packs % layout.pipeline:
            found.append(
                f"{where}.global_batch={self.global_batch} gives {self.global_batch // packs} micro-batches, which interleaved"
                f" stages need in multiples of parallel.pipeline={layout.pipeline}: make it a multiple of {packs * layout.pipeline}"
            )
        if self.sequence_length % layout.pack_multiple:
            found.append(
                f"{where}.sequence_length={self.sequence_length} must be a multiple of {layout.pack_multiple}"
                f" (tensor {layout.tensor} x context {layout.context}, two chunks a context rank)"
            )
        return found


@dataclass
class CheckpointConfig:
    """When to save and what to keep; the end of a phase is always saved."""

    every_steps: int = option(1000, "free", least=0, most=STEPS)
    """Optimizer steps between checkpoints; 0: only at the end of a phase."""
    keep: int = option(2, "free", least=1, most=10**6)
    """Newest checkpoints kept of each phase, its end among them."""
    keep_every_steps: int = option(0, "free", least=0, most=STEPS)
    """Besides, one checkpoint is kept for each so many steps of the run; 0: none."""
    asynchronous: bool = option(True, "free")
    """Write while training goes on; the end of a phase is always waited for."""
    on_error: str = option("continue", "free", choices=("continue", "stop"))
    """What to do when a checkpoint cannot be written: `continue` without it (three failures in a row, or one at the end of a
    phase, stop the run), or `stop` at once. Checkpoints before it stay whole either way."""


@dataclass
class LoggingConfig:
    """What is written beside metrics.jsonl, and how often a line is shown."""

    every_steps: int = option(10, "free", least=1, most=STEPS)
    wandb: bool = option(False, "free")
    tensorboard: bool = option(False, "free")


@dataclass
class EvaluationConfig:
    """Held-out loss and greedy answers."""

    samples: int = option(256, "free", least=1, most=10**7)
    """Most samples of each validation dataset."""
    phase_samples: int = option(64, "free", least=0, most=10**7)
    """Most samples of each validation dataset for the held-out loss at the start and end of a phase; 0: none."""
    pack_tokens: int = option(4096, "free", least=1, most=2**24)
    """Tokens of a pack in generation."""
    max_new_tokens: int = option(64, "free", least=1, most=2**20)
    """Longest answer generated."""
    pictures: int = option(24, "free", least=0, most=10_000)
    """Samples shown with their prediction in report.html."""


@dataclass
class RunConfig:
    """Everything a run is made of."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def problems(self, world_size: int) -> list[str]:
        """What cannot work, found from the values alone: one line a fault, each naming its option; empty if none."""
        if found := not_finite(self) or self._names() + self._out_of_range():
            return found
        layout = self.parallel.problems(world_size) + self.model.problems(self.parallel)
        found += layout
        found += self._kernel_problems() if not layout else []
        found += self._multiple_problems()
        if not self.phases:
            found.append("phases is empty: choose a run with +recipe=NAME")
        faults = {
            name: phase.problems(ANY_PHASE, list(self.data.datasets), world_size, self.parallel, self.model, dealt=not layout)
            for name, phase in self.phases.items()
        }
        found += _once(faults)
        found += self._lora_problems() if not layout else []
        if self.init.huggingface and self.init.checkpoint:
            found.append("init.huggingface and init.checkpoint are both set: weights come from one of them")
        return found

    def _kernel_problems(self) -> list[str]:
        """What the kernels of the run's precision cannot multiply in any layout of the run; on a GPU `auto` is bf16."""
        exact = self.run.precision == "fp32" or (self.run.precision == "auto" and self.run.device == "cpu")
        found = [
            line
            for layout in self._layouts()
            if not layout.out_of_range()
            for line in self.model.kernel_problems(4 if exact else 2, layout)
        ]
        return list(dict.fromkeys(found))

    def _layouts(self) -> list[ParallelConfig]:
        """The run's own layout, in which it is evaluated, and those of its phases."""
        return [self.parallel, *(phase.parallel for phase in self.phases.values() if phase.parallel is not None)]

    def _lora_problems(self) -> list[str]:
        """What adapters cannot do, by themselves and in the phases."""
        found = self.lora.problems(self.model)
        if self.lora.rank <= 0 or found:
            return found
        if not (self.init.huggingface or self.init.checkpoint):
            found.append(f"lora.rank={self.lora.rank} needs weights to adapt: set init.huggingface or init.checkpoint")
        for name, phase in self.phases.items():
            if phase.fresh:
                found.append(
                    f"phases.{name}.fresh={phase.fresh} would stay as drawn: with lora.rank above 0 only adapters train"
                )
            if not set(phase.trainable) & set(self.lora.groups):
                found.append(f"phases.{name}.trainable={phase.trainable} has no adapters: lora.groups={self.lora.groups}")
        return found

    def _multiple_problems(self) -> list[str]:
        """Whether samples take up tokens in the multiples that context parallelism cuts them into."""
        layouts = self._layouts()
        needed = math.lcm(*(layout.token_multiple for layout in layouts if layout.context > 0))
        found = []
        if self.data.pack_multiple > 0 and self.data.pack_multiple % needed:
            found.append(
                f"data.pack_multiple={self.data.pack_multiple} must be a multiple of {needed}:"
                f" parallel.context={max(layout.context for layout in layouts)} cuts each sample into that many chunks"
            )
        return found

    def _names(self) -> list[str]:
        """Names that cannot be parts of paths."""
        found = ["run.name is empty: give the run a name"] if not self.run.name else []
        names = {"run.name=": [self.run.name] if self.run.name else [], "phases.": self.phases}
        if LATEST in self.phases:
            found.append(f"phases.{LATEST}: a file of that name lies beside the folders of phases: give the phase another name")
        names |= {"data.datasets.": self.data.datasets, "data.validation.": self.data.validation}
        return found + [
            f"{option}{one_line(name)}: {fault}"
            for option, each in names.items()
            for name in each
            if (fault := name_fault(name))
        ]

    def _out_of_range(self) -> list[str]:
        """Values that no run can have; phases tell of theirs alike, and many sections are as many options."""
        sizes = {"phases": len(self.phases)}
        sizes |= {"data.datasets": len(self.data.datasets), "data.validation": len(self.data.validation)}
        if found := [
            f"{name} has {size} entries, at most {ENTRIES} are possible" for name, size in sizes.items() if size > ENTRIES
        ]:
            return found
        others = dataclasses.replace(self, phases={})
        return option_faults(others) + _once({name: option_faults(phase, ANY_PHASE) for name, phase in self.phases.items()})


def not_finite(config: Any, where: str = "") -> list[str]:
    """Numbers of a configuration, or of those inside it, that are infinite or none at all; one line each."""
    if isinstance(config, float) and not math.isfinite(config):
        return [f"{where}={config:g} must be a finite number"]
    if dataclasses.is_dataclass(config) or isinstance(config, dict):
        inner = config if isinstance(config, dict) else vars(config)
        return [line for name, value in inner.items() for line in not_finite(value, f"{where}.{name}".removeprefix("."))]
    return []


def _once(faults: Mapping[str, list[str]]) -> list[str]:
    """The faults of all phases, with one line for those that have the same."""
    phases: dict[str, list[str]] = {}
    for name, lines in faults.items():
        for line in lines:
            phases.setdefault(line, []).append(name)
    return [
        line.replace(ANY_PHASE, f"phases.{first}") + (f" (likewise {', '.join(others)})" if others else "")
        for line, (first, *others) in phases.items()
    ]
