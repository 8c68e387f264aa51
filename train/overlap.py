"""Data-parallel traffic beside computation: gradients are reduced during the backward pass, weights gathered during the forward pass.

Megatron-core's DDP cuts the parameters into buckets. The gradients of a bucket are reduced when the last micro-batch has computed
all of them. After an update each rank has its own part of the weights; the rest of a bucket is gathered when a module that owns
one of its parameters is called, and that of the next bucket meanwhile. So every parameter is used by a call of its module.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from megatron.core.distributed import DistributedDataParallel

from visionloom.common import pulse
from visionloom.parallel.parts import GATHERING
from visionloom.parallel.topology import Topology

LEAST_ELEMENTS: Final = 40_000_000
"""Of a bucket: 160 MB of fp32 gradients keep a ring bound by its bandwidth (Megatron-core's default)."""
ELEMENTS_A_RANK: Final = 1_000_000
"""Of a bucket, for each data rank: a ring's steps grow with its ranks, and each shall stay as large (Megatron-core's default)."""
FEWEST_BUCKETS: Final = 8
"""Of a small model, such as adapters: a single bucket has nothing to overlap with."""


class DataParallel(DistributedDataParallel):  # type: ignore[misc]
    """Megatron-core's DDP that also takes a gradient which autograd does not pass on.

    Where activations are kept in another form (model/kept.py), a linear layer that adds its gradient to the sum by itself has no
    way to mark the parameter, and passes on nothing. Megatron-core's own hook refuses that, as if the gradient were missing.
    """

    def _make_backward_post_hook(self, parameter: Any) -> Callable[..., None]:
        add: Callable[..., None] = super()._make_backward_post_hook(parameter)

        def hook(*arguments: Any) -> None:
            if parameter.grad is None and self.ddp_config.overlap_grad_reduce:
                group = self.param_to_bucket_group[parameter]
                group.register_grad_ready(parameter, self.force_all_reduce)
            else:
                add(*arguments)

        return hook

    def _make_forward_pre_hook(self) -> Callable[..., None]:
        gather: Callable[..., None] = super()._make_forward_pre_hook()

        def hook(module: torch.nn.Module, *arguments: Any) -> None:
            # Of a slow rank the others wait here: it is not their own time.
            with pulse.current.at(GATHERING):
                gather(module, *arguments)

        return hook


def overlaps(topology: Topology) -> bool:
    """Return whether collectives run beside computation in this layout: there are some, and parallel.overlap is on."""
    return topology.config.overlap and topology.groups.dp_cp.size() > 1


def bucket_elements(parts: Sequence[Any], topology: Topology) -> int:
    """Return the parameters of a bucket, about; `parts` of the model with its frozen parameters marked."""
    trained = 0
    for part in parts:
        trained += sum(each.numel() for each in part.parameters() if each.requires_grad)
    size = max(LEAST_ELEMENTS, ELEMENTS_A_RANK * topology.groups.dp_cp.size())
    return max(1, min(size, trained // FEWEST_BUCKETS))


def connect_schedule(wrapped: Sequence[Any]) -> None:
    """Let Megatron-core's schedules say when gradients are reduced: after the last micro-batch, and not after each.

    With several parts on a stage they also say when weights are gathered: a part has one bucket, which would otherwise be
    waited for as soon as it is asked for. All stages then begin to reduce and to gather at the same time.
    """
    several = len(wrapped) > 1
    no_sync = [part.no_sync for part in wrapped]
    for part in wrapped:
        config = part.module.config
        config.no_sync_func = no_sync if several else no_sync[0]
        if several:
            config.grad_sync_func = [each.start_grad_sync for each in wrapped]
        if part.ddp_config.align_param_gather:
            config.param_sync_func = [each.start_param_sync for each in wrapped]


@torch.no_grad()
def gather_weights(wrapped: Sequence[Any]) -> None:
    """Gather what other ranks have updated and no forward pass has asked for yet; all ranks of the data axis call it."""
    for part in wrapped:
        if not part.ddp_config.overlap_param_gather:
            continue
        for group in (*part.bucket_groups, *part.expert_parallel_bucket_groups):
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)
