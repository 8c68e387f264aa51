"""RunConfig: the schema of a whole run. The only file that knows every configuration.

YAML holds values, the dataclasses hold names, types and defaults. Nothing here imports torch, so that a wrong value is
refused in well under a second.
"""

import math
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace

import yaml

from visionloom.common.errors import unknown
from visionloom.common.names import name_fault
from visionloom.common.settings import ANY, check, likewise, option
from visionloom.common.text import one_line
from visionloom.data.config import DataConfig
from visionloom.model.config import ModelConfig
from visionloom.model.distillation_config import StepPacks
from visionloom.model.lora_config import LoraConfig
from visionloom.parallel.config import ParallelConfig
from visionloom.train.generation.config import Budget, GenerationConfig
from visionloom.train.observe.limits import WatchConfig
from visionloom.train.observe.logging_config import LoggingConfig
from visionloom.train.optim.config import OptimConfig
from visionloom.train.phase.config import STEPS, PhaseConfig

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
LATEST = "latest"
"""File next to the phases' folders of checkpoints that names the newest one."""
COMMAND = "evaluation.command"
"""The option that names a program to run."""
COMMAND_WORDS = ("{model}", "{out}")
"""What stands in evaluation.command for the exported model's folder and for that of its results."""


@dataclass
class RunSection:
    """Identity of the run and where it lives."""

    name: str = option("???", "free")
    """Name of the run, which its folder has too; part of a path."""
    folder: str = option("", "free")
    """Run folder; empty: runs/<name>."""
    seed: int = option(1234, "data", least=0, most=2**62)
    """Draws the weights, the order of samples and dropout: the same seed gives the same run."""
    device: str = option("auto", "free", choices=DEVICES)
    """`cpu` (gloo), `cuda` (NCCL), or `auto`: cuda where a GPU is visible."""
    precision: str = option("auto", "run", choices=PRECISIONS)
    """Arithmetic of the model: `fp32`, `bf16`, or `auto`: bf16 on a GPU, fp32 on a CPU."""
    threads: int = option(0, "free", least=0, most=1024)
    """CPU threads of each rank; 0: the cores divided by the ranks of this machine."""
    timeout_minutes: int = option(30, "free", least=1, most=10_000)
    """Longest wait of a rank for the others in a collective, after which the run ends; above what reading weights or writing a
    checkpoint may take."""
    deterministic: bool = option(False, "free")
    """Only kernels whose sums have a fixed order: the same run twice gives the same bits; slower on a GPU."""
    plan: bool = option(False, "free")
    """Plan the run before it starts, in up to a minute, and refuse what will not fit into memory; see docs/planning.md."""
    gpu: str = option("", "free")
    """File of recipes/gpu for that plan; empty: the one about the card that is there."""
    phases: list[str] = option([], "free")
    """Only these phases of the recipe, in the recipe's order, as if it had no others; empty: all. Samples, and their order, are those
    of the whole recipe."""
    phase: str = option("", "free")
    """Train only this one of them, and end: each phase may so have ranks of its own. Those before it must be done; empty: train all."""
    evaluate_at_end: bool = option(False, "free")
    """Evaluate on data.validation when the last phase is done."""
    start_anew: bool = option(False, "free")
    """Begin at step 0 where no checkpoint of the run is whole any more; what is left of them and the metrics is moved aside."""
    on_change: str = option("error", "free", choices=("error", "continue"))
    """If settings of the phase in progress or of the whole run differ from a checkpoint's: `error` says which, `continue` goes
    on with the new ones and says which. What is read has data.on_change."""

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line if the run's name cannot be part of a path."""
        if not self.name:
            yield f"{here}.name is empty: give the run a name"
        elif fault := name_fault(self.name):
            yield f"{here}.name={one_line(self.name)}: {fault}"


@dataclass
class InitConfig:
    """Where the first phase's weights come from; all empty: random from run.seed."""

    huggingface: str = option("", "run")
    """Folder of a Hugging Face model."""
    checkpoint: str = option("", "run")
    """Checkpoint folder of this or another run (weights only)."""
    vision: str = option("", "run")
    """Hugging Face folder of a vision tower alone (Qwen3-VL's, SigLIP or SigLIP 2) or of a model that has one; mergers are drawn."""
    language: str = option("", "run")
    """Hugging Face folder of a language model alone (Qwen3) or of a model that has one; what no folder has is drawn."""

    @property
    def has_parts(self) -> bool:
        """Return whether parts of the model come from folders of their own."""
        return bool(self.vision or self.language)

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line if the weights would come from two places."""
        if self.huggingface and self.checkpoint:
            yield f"{here}.huggingface and {here}.checkpoint are both set: weights come from one of them"
        for whole in ("huggingface", "checkpoint"):
            if getattr(self, whole) and self.has_parts:
                part = "vision" if self.vision else "language"
                yield (
                    f"{here}.{part} and {here}.{whole} are both set: {here}.{whole} has the whole model, unset one of them"
                )


@dataclass
class CheckpointConfig:
    """When to save and what to keep; the end of a phase is always saved."""

    every_steps: int = option(1000, "free", least=0, most=STEPS)
    """Optimizer steps between checkpoints; 0: only at the end of a phase."""
    keep: int = option(2, "free", least=1, most=10**6)
    """Newest checkpoints kept of each phase, its end among them."""
    keep_every_steps: int = option(0, "free", least=0, most=STEPS)
    """Also keep every checkpoint whose step of the run is a multiple of this; 0: none."""
    asynchronous: bool = option(True, "free")
    """Write while training goes on; the end of a phase is always waited for."""
    on_error: str = option("continue", "free", choices=("continue", "stop"))
    """Response to a checkpoint that cannot be written: `continue` without it (three failures in a row, or one at the end of a
    phase, stop the run), or `stop` at once. Checkpoints before it stay whole either way."""


@dataclass
class EvaluationConfig:
    """Held-out loss and greedy answers."""

    samples: int = option(256, "free", least=1, most=10**7)
    """Most samples of each validation dataset."""
    phase_samples: int = option(64, "free", least=0, most=10**7)
    """Most samples of each validation dataset for the held-out loss at the start and end of a phase; 0: none."""
    phase_answers: int = option(0, "free", least=0, most=10**7)
    """Most samples of each validation dataset that are answered at the end of a phase, for the accuracy of tasks; 0: none."""
    every_steps: int = option(0, "free", least=0, most=STEPS)
    """Optimizer steps of a phase between measurements of what is measured at its end; 0: at its end only. With rewards, those steps
    that end a rollout."""
    pack_tokens: int = option(4096, "free", least=1, most=2**24)
    """Tokens of the prompts that enter generation together."""
    cache_tokens: int = option(65_536, "free", least=1, most=2**32)
    """Tokens of all answers that are generated together, with their prompts: as many have keys and values in memory."""
    max_new_tokens: int = option(64, "free", least=1, most=2**20)
    """Longest answer generated."""
    report_samples: int = option(24, "free", least=0, most=10_000)
    """Samples shown with their prediction in report.html."""
    command: str = option("", "free")
    """Program with arguments that evaluates an export too, {model} and {out} in it being folders; only a command line sets it."""
    command_minutes: float = option(600.0, "free", above=0.0, most=100_000.0)
    """Longest time of it."""

    @property
    def budget(self) -> Budget:
        """Return the memory of generation."""
        return Budget(self.pack_tokens, self.cache_tokens)

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line if the command is no command line, or does not name its folders."""
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            yield f"{here}.command={one_line(self.command)} cannot be split into words: {error}"
            return
        arguments = " ".join(words[1:])
        lacking = [name for name in COMMAND_WORDS if name not in arguments]
        if self.command and lacking:
            needs = " and ".join(lacking)
            yield (
                f"{here}.command={one_line(self.command)} lacks {needs}: write {{model}} where it takes the exported"
                " model's folder, and {out} where it takes the folder for its results"
            )


@dataclass
class RunConfig:
    """Everything a run is made of."""

    run: RunSection = field(default_factory=RunSection)
    """Identity of the run and where it lives."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model's architecture."""
    init: InitConfig = field(default_factory=InitConfig)
    """Where the first phase's weights come from."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters that train in place of the weights."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the model over the ranks."""
    data: DataConfig = field(default_factory=DataConfig)
    """Datasets, and how samples become packs."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer and gradient clipping."""
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    """Phases by name, in the order in which they train."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save and what to keep."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Logs other than metrics.jsonl."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out loss and greedy answers."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Answers that launch/generate.py draws."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """How long a rank may be silent."""

    def to_yaml(self) -> str:
        """Return the whole configuration as YAML, as a run and its submissions keep it."""
        return yaml.safe_dump(asdict(self), sort_keys=False)

    @property
    def datasets_read(self) -> set[str]:
        """Return the names of the training datasets that a phase draws from."""
        names = set[str]()
        for phase in self.phases.values():
            names |= self.data.drawn_weights(phase.mixture).keys()
        return names

    def phase_data(self, name: str) -> DataConfig:
        """Return the input of a phase: the run's, with the phase's sampling of videos."""
        return replace(self.data, media=self.phases[name].video.applied_to(self.data.media))

    def phase_optim(self, name: str) -> OptimConfig:
        """Return the optimizer of a phase: its own, or the run's."""
        return self.phases[name].optim or self.optim

    def all_problems(self, world_size: int) -> list[str]:
        """Return what cannot work on `world_size` ranks: a line a problem, naming its option; empty if all can.

        Each section checks itself (common/settings.py); what needs several of them is checked here, with values in their bounds.
        """
        own = check(self)
        lines = own.lines
        if LATEST in self.phases:
            lines.append(
                f"phases.{LATEST}: a file of that name lies beside the folders of phases: give the phase another name"
            )
        if own.bounds:
            return lines

        for name in self.phases:
            media = self.phase_data(name).media
            # Those of data.media itself are checked already.
            if media != self.data.media:
                lines += check(media, f"phases.{name}.video: data.media").lines
        lines += self.layout_problems(world_size)
        lines += self._engine_problems()
        if not self._problems_of(self.parallel, "parallel", world_size):
            lines += self._lora_problems()
        return lines

    def layout_problems(self, world_size: int) -> list[str]:
        """Return what the layouts of the run and of its phases cannot do on `world_size` ranks; all values are in their bounds.

        It takes a tenth of the time of `all_problems`: a search looks at thousands of layouts.
        """
        layout = self._problems_of(self.parallel, "parallel", world_size)
        lines = layout + self._multiple_problems()
        if not self.phases:
            lines.append("phases is empty: choose a run with +recipe=NAME")
        by_phase = {
            name: self._phase_problems(phase, world_size)
            for name, phase in self.phases.items()
            # On how many ranks another start trains the others is not known.
            if self.run.phase in ("", name)
        }
        lines += likewise("phases", by_phase)
        return lines if layout else lines + self._kernel_problems()

    def _problems_of(self, layout: ParallelConfig, here: str, world_size: int) -> list[str]:
        """Return what the ranks cannot hold of a layout, and what it does not divide of the model."""
        return layout.world_problems(world_size, here) + self.model.layout_problems(layout, here)

    def _phase_problems(self, phase: PhaseConfig, world_size: int) -> list[str]:
        """Return what a phase, called `phases.<name>`, cannot do with this run's data, ranks and model."""
        here, datasets = f"phases.{ANY}", list(self.data.datasets)
        named = [(f"{here}.mixture", name) for name in phase.mixture]
        if phase.rl is not None:
            named += [(f"{here}.rl.judged_by", name) for name in phase.rl.judged_by]
        lines = [unknown(path, name, datasets) for path, name in named if name not in datasets]
        layout, where = (
            phase.parallel or self.parallel,
            f"{here}.parallel" if phase.parallel else "parallel",
        )
        faults = self._problems_of(layout, where, world_size)
        if phase.parallel:  # those of the run's layout have lines of their own
            lines += faults
        if not faults:
            lines += phase.dealing_problems(here, world_size, layout)
        if phase.distillation:
            where, micro_batches = f"{here}.distillation", phase.global_batch // phase.micro_batch
            packs = StepPacks(micro_batches, phase.sequence_length, self.data.sample_token_multiple)
            lines += phase.distillation.dealing_problems(where, world_size, packs)
        return lines

    def _layouts(self) -> dict[str, ParallelConfig]:
        """Return the run's own layout, in which it is evaluated, and those of its phases, by dotted path."""
        layouts = {"parallel": self.parallel}
        for name, phase in self.phases.items():
            if phase.parallel is not None:
                layouts[f"phases.{name}.parallel"] = phase.parallel
        return layouts

    def _kernel_problems(self) -> list[str]:
        """Return what the kernels of the run's precision cannot multiply in any layout of the run."""
        # `auto` is bf16 on a GPU, and only `cpu` is sure to be none.
        is_fp32 = self.run.precision == "fp32" or (
            self.run.precision == "auto" and self.run.device == "cpu"
        )
        lines: list[str] = []
        for path, layout in self._layouts().items():
            lines += self.model.kernel_problems(4 if is_fp32 else 2, layout, path)
        return list(dict.fromkeys(lines))

    def _optimizers(self) -> dict[str, OptimConfig]:
        """Return the optimizers that some phase has, by dotted path."""
        optimizers = {}
        for name, phase in self.phases.items():
            path = "optim" if phase.optim is None else f"phases.{name}.optim"
            optimizers[path] = self.phase_optim(name)
        return optimizers

    def _engine_problems(self) -> list[str]:
        """Return what DeepSpeed does not do that the run asks for."""
        lines = []
        for path, layout in self._layouts().items():
            if layout.engine != "deepspeed":
                continue
            here = f"{path}.engine=deepspeed"
            for own, optim in self._optimizers().items():
                if optim.name != "adamw" or optim.moments != "fp32":
                    lines.append(
                        f"{here} has AdamW with moments in fp32: choose {own}.name=adamw and {own}.moments=fp32, or"
                        f" {path}.engine=megatron"
                    )
            if layout.tensor > 1 and self.model.text.experts:
                lines.append(
                    f"{here} does not cut a mixture of experts: leave out {path}.tensor={layout.tensor}, or choose"
                    f" {path}.engine=megatron"
                )
        return lines

    def _lora_problems(self) -> list[str]:
        """Return what adapters cannot do with this model and in these phases."""
        if not self.lora.rank:
            return []
        if lines := self.lora.layer_problems(self.model):
            return lines

        for path, optim in self._optimizers().items():
            if optim.name == "muon":
                lines.append(
                    f"{path}.name=muon is for whole matrices, and lora.rank={self.lora.rank} trains low-rank factors:"
                    f" choose {path}.name=adamw"
                )
        if not (self.init.huggingface or self.init.checkpoint):
            lines.append(
                f"lora.rank={self.lora.rank} needs weights to adapt: set init.huggingface or init.checkpoint"
            )
        for name, phase in self.phases.items():
            lines += phase.adapter_problems(f"phases.{name}", self.lora)
        return lines

    def _multiple_problems(self) -> list[str]:
        """Return a line unless samples take up tokens in the multiples that context parallelism cuts them into."""
        layouts = list(self._layouts().values())
        needed = math.lcm(*(layout.sample_token_multiple for layout in layouts))
        multiple = self.data.sample_token_multiple
        if multiple % needed == 0:
            return []
        return [
            f"data.sample_token_multiple={multiple} must be a multiple of {needed}:"
            f" parallel.context={max(layout.context for layout in layouts)} cuts each sample into that many chunks"
        ]
