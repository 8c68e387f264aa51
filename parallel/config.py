"""Degrees of the parallel axes and the checks that need no process group.

Nothing here imports torch: a layout that cannot be built is refused before any rank has paid for the import.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from visionloom.common.settings import check, option

RECOMPUTATIONS = ("none", "norms_and_activations", "mlp", "block", "all_but_attention", "full")
"""From the least memory saved to the most."""
EXCHANGES = ("gather", "ulysses")
ENGINES = ("megatron", "deepspeed")
OFFLOADS = ("none", "cpu", "nvme")


@dataclass
class ZeroConfig:
    """What DeepSpeed's ZeRO divides among the data-parallel ranks, and what it keeps outside of the device."""

    stage: int = option(3, "free", least=1, most=3)
    """Divided among the ranks: 1, the optimizer; 2, gradients too; 3, weights too."""
    offload_optimizer: str = option("none", "free", choices=OFFLOADS)
    """Where master weights and moments are kept, and the update computed: `none` (on the device), `cpu` or `nvme` (stage 3)."""
    offload_parameters: str = option("none", "free", choices=OFFLOADS)
    """Where the weights are kept until a layer needs them, in stage 3: `none` (on the device), `cpu` or `nvme`."""
    nvme_path: str = option("", "free")
    """Folder on a fast local disk of each machine, for `nvme`; each process has a folder of its own there."""
    bucket_bytes: int = option(1 << 28, "free", least=1 << 10, most=1 << 34)
    """Of gradients that are reduced, of weights that are gathered, and of an optimizer on disk that is updated, at once."""

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line for each option that needs another one."""
        disk = [
            name
            for name in ("offload_optimizer", "offload_parameters")
            if getattr(self, name) == "nvme"
        ]
        if disk and not self.nvme_path:
            yield f"{here}.{disk[0]}=nvme needs {here}.nvme_path, a folder on a fast disk of each machine"
        if self.stage < 3 and self.offload_parameters != "none":
            yield f"{here}.offload_parameters={self.offload_parameters} needs {here}.stage=3 (now {self.stage}): others keep the weights whole"
        if self.stage < 3 and self.offload_optimizer == "nvme":
            yield f"{here}.offload_optimizer=nvme needs {here}.stage=3 (now {self.stage}), or cpu"


@dataclass
class ParallelConfig:
    """Degrees of parallelism; data parallelism is what remains of the world size."""

    tensor: int = option(1, "free", least=1, most=65_536)
    """Ranks that share every matrix of a language layer."""
    pipeline: int = option(1, "free", least=1, most=65_536)
    """Stages that the language layers are cut into."""
    virtual_pipeline: int | None = option(None, "free", least=1, most=1024)
    """Chunks of layers on each pipeline stage (interleaved 1F1B)."""
    context: int = option(1, "free", least=1, most=65_536)
    """Ranks that share the tokens of one sequence."""
    context_exchange: str = option("gather", "free", choices=EXCHANGES)
    """Way in which attention sees the tokens of other context ranks: `gather` all keys and values (any degree), or `ulysses` (heads for
    tokens; tensor x context must divide the key/value heads)."""
    expert: int = option(1, "free", least=1, most=65_536)
    """Ranks that share the experts of a mixture-of-experts layer."""
    expert_tensor: int | None = option(None, "free", least=1, most=65_536)
    """Ranks that share the matrices of one expert; None: 1."""
    sequence: bool | None = option(None, "free")
    """Sequence parallelism in the tensor-parallel group; None: on where tensor > 1, with engine=megatron."""
    pipeline_layout: str | None = option(None, "free")
    """Embedding (E), decoder layers (t) and loss (L) over the stages, for example `Ettt|tttt|ttL` or `Et|(t*3|)*6tL`; None: evenly."""
    recompute: str = option("none", "free", choices=RECOMPUTATIONS)
    """What is made again in the backward pass and not kept: `none`; `norms_and_activations`, whose results cost little (the others
    make them again too); `mlp`, the MLPs or experts too; `block`, the first recompute_layers decoder layers whole;
    `all_but_attention`, all but what attention itself returns; `full`, all."""
    recompute_layers: int = option(0, "free", least=0, most=1024)
    """Decoder layers of each chunk of the model that recompute=block makes again whole, and all_but_attention but for attention's
    results; 0, with the latter alone: all layers."""
    overlap: bool = option(True, "free")
    """Reduce gradients during the backward pass and gather updated weights during the forward pass, where data ranks share them."""
    offload_activations: bool = option(False, "free")
    """Keep what the decoder layers save for the backward pass in host memory."""
    engine: str = option("megatron", "free", choices=ENGINES)
    """What divides and updates the weights: `megatron` for every layout, or `deepspeed` (ZeRO) with data and tensor parallelism."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """Options of engine=deepspeed."""
    expert_parts: int = option(1, "free", least=1, most=16)
    """Parts of a rank's tokens that go to the experts of other ranks one after the other: while the experts work on one, the next
    one's rows travel. 2 hides half of the exchanges, for as many more launches."""

    @property
    def sequence_parallel(self) -> bool:
        """Return whether activations between the tensor-parallel regions are split over the tokens."""
        # DeepSpeed adds up gradients over the data ranks alone: the tensor ranks must have all of those of norms.
        by_default = self.tensor > 1 and self.engine == "megatron"
        return by_default if self.sequence is None else self.sequence

    @property
    def divides_weights(self) -> bool:
        """Return whether no rank has a layer's weights whole until the layer is called."""
        return self.engine == "deepspeed" and self.zero.stage == 3

    @property
    def model_parallel_size(self) -> int:
        """Return the number of ranks that hold one copy of the model between them."""
        return self.tensor * self.pipeline * self.context

    @property
    def chunks(self) -> int:
        """Return the number of chunks of layers on each stage."""
        return self.virtual_pipeline or 1

    @property
    def chunk_numbers(self) -> list[int | None]:
        """Return the numbers by which Megatron-core knows a stage's chunks; a single one has none."""
        return [*range(self.chunks)] if self.chunks > 1 else [None]

    @property
    def encoder_ranks(self) -> int:
        """Return the number of ranks that share the pictures of a pack.

        They are those of its first pipeline stage that see different tokens of it.
        """
        return self.context * (self.tensor if self.sequence_parallel else 1)

    @property
    def sample_token_multiple(self) -> int:
        """Return the divisor of the tokens that each sample takes up: two pieces for every context rank."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def pack_token_multiple(self) -> int:
        """Return the divisor of the tokens of a pack: every rank holds as many."""
        tokens = self.tensor if self.sequence_parallel else 1
        return math.lcm(self.sample_token_multiple, self.context * tokens)

    def data_parallel_size(self, world_size: int) -> int:
        """Return the copies of the model that `world_size` ranks hold; check `world_problems` first."""
        return world_size // self.model_parallel_size

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line for each degree that needs another one."""
        if self.engine == "deepspeed":
            yield from self._engine_problems(here)
        if self.sequence and self.tensor == 1:
            yield f"{here}.sequence=true needs {here}.tensor of 2 or more (now 1)"
        if self.expert_parts > 1 and self.expert == 1:
            yield (
                f"{here}.expert_parts={self.expert_parts} needs {here}.expert of 2 or more (now 1):"
                f" set {here}.expert_parts=1, or raise {here}.expert"
            )
        if self.recompute == "block" and not self.recompute_layers:
            yield f"{here}.recompute=block needs {here}.recompute_layers, the number of layers"
        if self.recompute_layers and self.recompute not in ("block", "all_but_attention"):
            yield (
                f"{here}.recompute_layers={self.recompute_layers} needs {here}.recompute=block or all_but_attention"
                f" (now {self.recompute})"
            )
        if self.virtual_pipeline is not None and self.pipeline == 1:
            yield (
                f"{here}.virtual_pipeline={self.virtual_pipeline} needs {here}.pipeline of 2 or more (now 1):"
                f" leave it out or raise {here}.pipeline"
            )

    def _engine_problems(self, here: str) -> Iterator[str]:
        """Yield a line for each axis that DeepSpeed does not divide the model by."""
        degrees = {"pipeline": self.pipeline, "context": self.context, "expert": self.expert}
        degrees |= {"expert_tensor": self.expert_tensor or 1, "sequence": 1 + bool(self.sequence)}
        for axis, degree in degrees.items():
            if degree > 1:
                yield (
                    f"{here}.engine=deepspeed has data and tensor parallelism only: leave out {here}.{axis}, or choose"
                    f" {here}.engine=megatron"
                )

    def world_problems(self, world_size: int, here: str = "parallel") -> list[str]:
        """Return a line for each degree that `world_size` ranks cannot hold; values are in their bounds, empty if all fits."""
        if world_size % self.model_parallel_size:
            return [
                f"{world_size} ranks cannot hold tensor {self.tensor} x pipeline {self.pipeline} x context {self.context}"
                f" = {self.model_parallel_size}: start a multiple of {self.model_parallel_size} ranks or change {here}.*"
            ]
        # Experts are dealt over the ranks of one stage, data-parallel ones included.
        expert_tensor = self.expert_tensor or 1
        experts = self.expert * expert_tensor
        stage = world_size // self.pipeline
        if stage % experts:
            return [
                f"the {stage} ranks of a pipeline stage cannot hold expert {self.expert} x expert_tensor {expert_tensor}"
                f" = {experts}: start a multiple of {experts * self.pipeline} ranks or change {here}.*"
            ]
        return []

    def all_problems(self, world_size: int, here: str = "parallel") -> list[str]:
        """Return all that makes this layout impossible on `world_size` ranks: a line a problem, naming the option."""
        # Beyond their bounds the degrees may be 0, by which nothing can be divided.
        own = check(self, here)
        return own.lines if own.bounds else own.lines + self.world_problems(world_size, here)
