"""Ways that NCCL has taken between ranks, read from its own debug output. Imports no torch.

Lines are those of NCCL_DEBUG=INFO: `HOST:PID:THREAD [0] NCCL INFO Channel 00/0 : 0[0] -> 2[0] [send] via NET/IB/3/GDRDMA`.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Final

CHANNEL: Final = re.compile(
    r"NCCL INFO Channel \d+(?:/\d+)? : \d+\[\w+\] -> \d+\[\w+\] (?:\[\w+\] )?via (\S.*)"
)
NUMBER: Final = re.compile(r"\d+(\(\d+\))?")
"""Part of a way that names an adapter, with the rank behind which it is."""


def transports_of(log: str) -> list[str]:
    """Return the kinds of ways that a log names, without numbers of adapters."""
    kinds = set[str]()
    for line in log.splitlines():
        if way := CHANNEL.search(line):
            parts = way[1].strip().split("/")
            kinds.add("/".join(part for part in parts if not NUMBER.fullmatch(part)))
    return sorted(kinds)


def transport_hints(transports: Iterable[str]) -> Iterator[str]:
    """Yield a line for each way that is slower than what clusters have, with where to look."""
    kinds = list(transports)
    if any(kind.startswith("NET/Socket") for kind in kinds):
        yield (
            "NCCL goes to other machines by TCP (NET/Socket), not by InfiniBand or RoCE: look whether the container has"
            " /dev/infiniband, and at NCCL_IB_DISABLE, NCCL_IB_HCA and NCCL_SOCKET_IFNAME"
        )
    if any(kind.startswith("NET/IB") and "GDRDMA" not in kind for kind in kinds):
        yield (
            "NCCL goes to other machines through the memory of the host (NET/IB without GDRDMA): load nvidia-peermem, or use a"
            " driver with DMA-BUF"
        )
    if any(kind.startswith(("SHM", "direct shared")) for kind in kinds):
        yield (
            "GPUs of one machine exchange data through its memory (SHM), not by NVLink or PCIe: look at nvidia-smi topo -m and"
            " NCCL_P2P_DISABLE"
        )
