"""What is assumed of a GPU and of the nodes that it stands in: a file of recipes/gpu holds the numbers. Imports no torch."""

from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from typing import Final

from visionloom.common.errors import UserError, unknown
from visionloom.common.jsonfile import JsonError, checked
from visionloom.common.settings import check, option
from visionloom.common.yamlfile import read_yaml

GIB: Final = 1 << 30
FOLDER: Final = "gpu"
"""Of recipes/: the only one whose files are no ingredients of a run."""
DEFAULT_ATTENTION: Final = "flash2"
"""Kernels of attention that a plan is made for where the run names no others."""


@dataclass
class Machine:
    """A GPU with its memory, speeds and links.

    Bandwidths are those of one direction, and in GB/s (10^9 bytes) what nccl-tests calls the bus bandwidth.
    """

    memory_gib: float = option(0.0, "free", above=0, most=4096)
    """Memory that the driver reports, GiB."""
    reserved_gib: float = option(0.0, "free", above=0, most=64)
    """What torch's allocator never gets of it: CUDA's context, workspaces of cuBLAS, buffers of NCCL; GiB."""
    bf16_tflops: float = option(0.0, "free", above=0, most=1e6)
    """Peak of dense matrix products, 10^12 operations a second; MFU is a share of it."""
    fp32_tflops: float = option(0.0, "free", above=0, most=1e6)
    """The same in fp32 without TF32, which torch leaves off: products of the router."""
    product_share: float = option(0.0, "free", above=0, most=1)
    """Share of the peak that large matrix products reach."""
    product_start: float = option(0.0, "free", above=0, most=1e-3)
    """Seconds that a product takes longer than its operations: tiles fill, and the last wave of them is not full."""
    attention_forward_share: float = option(0.0, "free", above=0, most=1)
    """Share of the peak of bf16 that attention reaches in its forward pass: in a file, that of FlashAttention-2."""
    attention_backward_share: float = option(0.0, "free", above=0, most=1)
    """The same in its backward pass, the scores made again included."""
    flash3_forward_share: float | None = option(None, "free", above=0, most=1)
    """The forward pass of FlashAttention-3; None: it does not run there, or its speed is not known."""
    flash3_backward_share: float | None = option(None, "free", above=0, most=1)
    """Its backward pass."""
    flash4_forward_share: float | None = option(None, "free", above=0, most=1)
    """The forward pass of FlashAttention-4; None: likewise."""
    flash4_backward_share: float | None = option(None, "free", above=0, most=1)
    """Its backward pass."""
    memory_gbps: float = option(0.0, "free", above=0, most=1e6)
    """Peak bandwidth of the memory, GB/s."""
    memory_share: float = option(0.0, "free", above=0, most=1)
    """Share of it that large elementwise kernels reach."""
    host_gbps: float = option(0.0, "free", above=0, most=1e5)
    """Measured bandwidth between the memory of the host and that of the GPU, pinned, GB/s."""
    kernel_start: float = option(0.0, "free", above=0, most=1e-3)
    """Seconds that the smallest kernel takes on the device."""
    launch: float = option(0.0, "free", above=0, most=1e-3)
    """Seconds of the host for each kernel: a step is never faster than its host."""
    node_ranks: int = option(0, "free", least=1, most=1024)
    """GPUs of a node, between which the fast links are."""
    inside_gbps: float = option(0.0, "free", above=0, most=1e5)
    """Measured bandwidth of a GPU to others of its node, GB/s."""
    inside_hop: float = option(0.0, "free", above=0, most=1e-2)
    """Seconds of a step of a ring inside a node."""
    between_gbps: float = option(0.0, "free", above=0, most=1e5)
    """Measured bandwidth of a GPU's own share of the network, GB/s."""
    between_hop: float = option(0.0, "free", above=0, most=1e-2)
    """Seconds of a step of a ring from node to node."""
    collective_start: float = option(0.0, "free", above=0, most=1e-2)
    """Seconds of any collective before its first byte moves."""

    @property
    def usable_bytes(self) -> int:
        """Return the bytes that tensors can have."""
        return round((self.memory_gib - self.reserved_gib) * GIB)

    @property
    def peak(self) -> float:
        """Return the operations a second that MFU is a share of."""
        return self.bf16_tflops * 1e12

    def with_attention(self, asked: str, name: str) -> "Machine":
        """Return the machine as its file says, with the speed of the kernels of attention that a run asks for.

        Args:
            asked: model.attention.
            name: of the machine.

        Raises:
            UserError: for kernels whose speed its file does not say.
        """
        kernels = planned_attention(asked)
        if kernels == DEFAULT_ATTENTION:
            return self
        forward, backward = (
            getattr(self, f"{kernels}_{way}_share") for way in ("forward", "backward")
        )
        if forward is None or backward is None:
            raise UserError(
                f"model.attention={asked} cannot be planned: recipes/{FOLDER}/{name}.yaml says no speed of these kernels on gpu={name}:"
                " use model.attention=auto, or another gpu"
            )
        return replace(self, attention_forward_share=forward, attention_backward_share=backward)

    def node(self, rank: int) -> int:
        """Return the number of the node that a rank is on: ranks fill one node after the other."""
        return rank // self.node_ranks


def planned_attention(asked: str) -> str:
    """Return the kernels whose speed a plan assumes for `model.attention`.

    torch's own are FlashAttention-2. `auto` takes flash3 where its package is installed, which a plan cannot know.
    """
    return DEFAULT_ATTENTION if asked in ("auto", "torch") else asked


def machine_names() -> list[str]:
    """Return the names of the GPUs that are known."""
    folder = files("visionloom.recipes").joinpath(FOLDER)
    names = [entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return sorted(name.removesuffix(".yaml") for name in names)


def machine(name: str) -> Machine:
    """Read the assumptions about a GPU; UserError for one that is not known, or whose file is spoilt."""
    if name not in machine_names():
        raise UserError(unknown("gpu", name, machine_names()))
    where = f"recipes/{FOLDER}/{name}.yaml"
    try:
        with as_file(files("visionloom.recipes").joinpath(FOLDER)) as folder:
            values = read_yaml(folder, f"{name}.yaml")
        read = checked(values, Machine, where)
    except JsonError as error:
        raise UserError(str(error)) from None
    # A number that is left out would be 0, which no bound allows where it matters.
    if problems := check(read).lines:
        raise UserError(*(f"{where}: {problem}" for problem in problems))
    return read
