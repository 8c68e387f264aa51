"""Megatron's distributed optimizer around AdamW or Muon, with a learning rate for each parameter group."""

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    clip_grads,
    distrib_optimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from visionloom.model.kernels.product import accumulate_in_products
from visionloom.model.sharding import canonical_parameters
from visionloom.model.trainable import group_of
from visionloom.parallel.topology import Topology
from visionloom.train.optim.adamw import GroupStepAdamW
from visionloom.train.optim.config import OptimConfig
from visionloom.train.optim.matrices import is_matrix, shard_of, whole_parameters
from visionloom.train.optim.muon import MuonAdamW, Stage
from visionloom.train.optim.rounded import RoundedAdamW, place_of
from visionloom.train.overlap import DataParallel, bucket_elements, connect_schedule, overlaps
from visionloom.train.phase.config import PhaseConfig

DECAY_STYLES = {"cosine": "cosine", "linear": "linear", "wsd": "WSD", "constant": "constant"}


@contextmanager
def optimizer_as(kind: type[GroupStepAdamW]) -> Iterator[None]:
    """Let Megatron-core build an optimizer of ours inside, and treat it as it treats FusedAdam."""
    # Both have imported the name; the flags say where a class's step count is.
    ours: list[tuple[Any, dict[str, Any]]] = [
        (megatron_optimizer, {"Adam": kind, "USING_PYTORCH_OPTIMIZER": False}),
        (distrib_optimizer, {"Adam": kind, "HAVE_APEX_OR_TE": True}),
        (distrib_optimizer, {"USING_TE_OPTIMIZER": True, "USING_APEX_OPTIMIZER": False}),
    ]
    # Put back afterwards: an optimizer that someone else builds in this process is not ours.
    with ExitStack() as stack:
        for module, names in ours:
            stack.enter_context(patch.multiple(module, **names))
        yield


def norm_on_device(
    chunk_size: int,
    flag: Any,
    tensor_lists: list[list[Tensor]],
    *_: Any,
) -> tuple[Tensor, None]:
    """Return the norm of all tensors, fp32 [1] on their device.

    The arguments are those of Apex's multi_tensor_l2norm.
    """
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.norm(torch.stack(norms)).reshape(1), None


def scale_in_place(
    chunk_size: int,
    flag: Any,
    tensor_lists: list[list[Tensor]],
    scale: float,
) -> None:
    """Multiply all tensors by a number, where they are.

    The arguments are those of Apex's multi_tensor_scale; both lists are of the same tensors, as Megatron-core's clipping has it.
    """
    torch._foreach_mul_(tensor_lists[0], scale)


def install_clipping() -> None:
    """Replace Megatron-core's clipping for machines without Apex.

    It brings the norm of each tensor to the host by itself, and writes each one twice: some 800 kernels for 2B, now three.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = norm_on_device
        clip_grads.multi_tensor_scale_impl = scale_in_place


def wrap_data_parallel(
    parts: list[Any], topology: Topology, sharded: bool = True
) -> list[DistributedDataParallel]:
    """Wrap each part of the model in Megatron's DDP.

    Args:
        parts: whose parameters are frozen or not already.
        topology: of the model.
        sharded: for the distributed optimizer (ZeRO-1).
    """
    overlapped = overlaps(topology)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=sharded,
        overlap_grad_reduce=overlapped,
        # Without the distributed optimizer every rank updates all weights.
        overlap_param_gather=overlapped and sharded,
        align_param_gather=overlapped and sharded and len(parts) > 1,
        bucket_size=bucket_elements(parts, topology) if overlapped else None,
    )
    wrapped = []
    for number, part in enumerate(parts):
        # As Megatron-core's own training: only the first part of a virtual pipeline has buckets.
        wrapped.append(
            DataParallel(
                part.config,
                settings,
                part,
                pg_collection=topology.groups,
                disable_bucketing=number > 0,
            )
        )
        accumulate_in_products(part)
    if overlapped:
        connect_schedule(wrapped)
    return wrapped


def build_optimizer(
    wrapped: list[DistributedDataParallel], optim: OptimConfig, phase: PhaseConfig, bf16: bool
) -> Any:
    """Build Megatron's optimizer for one phase; norms and biases are not decayed.

    Args:
        wrapped: the parts of the model in Megatron's DDP.
        optim: betas, weight decay, clipping.
        phase: peak learning rate of each trainable group.
        bf16: the parameters are bf16, and fp32 copies are kept.
    """
    install_clipping()
    overrides = rate_overrides(phase)
    undecayed = ParamWithNamePredicate(
        name="undecayed", fn=lambda parameter, name: parameter.dim() == 1
    )
    overrides[ParamKey(with_name_predicate=undecayed)] = {"wd_mult": 0.0}
    if optim.name == "muon":
        matrices = ParamWithNamePredicate(
            name="matrices", fn=lambda parameter, name: is_matrix(name_in_model(name), parameter)
        )
        overrides[ParamKey(with_name_predicate=matrices)] = {"momentum": optim.momentum}
    settings = megatron_settings(optim, phase, bf16)
    with optimizer_as(optimizer_class(optim)):
        optimizer = get_megatron_optimizer(
            settings, wrapped, config_overrides=overrides, use_gloo_process_groups=False
        )
    if optim.name == "muon":
        join_stage(optimizer, wrapped)
    if optim.moments == "bf16_stochastic":
        tell_places(optimizer, wrapped)
    return optimizer


def optimizer_class(optim: OptimConfig) -> type[GroupStepAdamW]:
    """Return the class of the optimizer inside Megatron's."""
    if optim.name == "muon":
        return MuonAdamW
    return GroupStepAdamW if optim.moments == "fp32" else RoundedAdamW


def tell_places(optimizer: Any, wrapped: list[DistributedDataParallel]) -> None:
    """Let stochastic rounding know where each stretch is in its whole tensor."""
    topology: Topology = wrapped[0].module.topology
    names = names_of(wrapped)
    for inner in optimizer.chained_optimizers:
        # A stage may train nothing.
        if inner.is_stub_optimizer:
            continue
        places = {}
        for parameter in inner.model_param_group_index_map:
            name = names[parameter]
            begin = inner._get_model_param_range_map(parameter)["param"].start
            place = place_of(name, parameter, begin, topology)
            key = zlib.crc32(f"{topology.seed} {name}".encode())
            places[shard_of(inner, parameter)] = place, key
        inner.optimizer.places = places


def join_stage(optimizer: Any, wrapped: list[DistributedDataParallel]) -> None:
    """Let Muon know who holds what of the matrices of this rank's pipeline stage."""
    names = names_of(wrapped)
    model = wrapped[0].module
    topology: Topology = model.topology
    stage = Stage(topology.groups.tp_dp_cp, topology.device)
    for inner in optimizer.chained_optimizers:
        # A stage may train nothing.
        if not inner.is_stub_optimizer:
            wholes = whole_parameters(inner, names, topology, model.model_config)
            inner.optimizer.join_stage(wholes, stage)


def names_of(wrapped: list[DistributedDataParallel]) -> dict[Any, str]:
    """Return the canonical names of the parameters of all parts."""
    names = {}
    for part in wrapped:
        for name, parameter in canonical_parameters(part.module):
            names[parameter] = name
    return names


def name_in_model(name: str) -> str:
    """Return the name of a parameter in the model from that in its data-parallel wrapper."""
    return name.removeprefix("module.")


def megatron_settings(optim: OptimConfig, phase: PhaseConfig, bf16: bool) -> OptimizerConfig:
    """Return Megatron's settings of the optimizer; `bf16`: of the parameters."""
    # Those of the group with the highest peak; each group has its own in `rate_overrides`.
    highest = max(phase.peak_learning_rates().values())
    return OptimizerConfig(
        optimizer="adam",
        lr=highest,
        min_lr=highest * phase.lr_min_ratio,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.epsilon,
        clip_grad=optim.clip_grad,
        bf16=bf16,
        use_distributed_optimizer=True,
    )


def rate_overrides(phase: PhaseConfig) -> dict[Any, dict[str, float]]:
    """Return Megatron's settings of the parameters of each trainable group: their learning rates."""
    overrides: dict[Any, dict[str, float]] = {}
    for group, peak in phase.peak_learning_rates().items():
        overrides[ParamKey(with_name_predicate=in_group(group))] = rates_of(peak, phase)
    return overrides


def rates_of(peak: float, phase: PhaseConfig) -> dict[str, float]:
    """Return the highest and the last learning rate of a group in Megatron's terms."""
    return {"max_lr": peak, "min_lr": peak * phase.lr_min_ratio}


def in_group(group: str) -> ParamWithNamePredicate:
    """Return Megatron's test of whether a parameter is in a group."""

    def matches(parameter: Tensor, name: str) -> bool:
        return group_of(name_in_model(name)) == group

    return ParamWithNamePredicate(name=group, fn=matches)


def build_scheduler(
    optimizer: Any, optim: OptimConfig, phase: PhaseConfig
) -> OptimizerParamScheduler:
    """Build warm-up and the phase's decay; step it once before each update, so that the last update has the last rate."""
    steps = phase.total_steps
    peaks = phase.peak_learning_rates().values()
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=max(peaks),
        min_lr=0.0,
        lr_warmup_steps=phase.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=DECAY_STYLES[phase.schedule],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=phase.decay_steps or max(1, steps // 10),  # unused by other styles
        lr_wsd_decay_style="linear",
    )


def learning_rates(scheduler: OptimizerParamScheduler, phase: PhaseConfig) -> dict[str, float]:
    """Return the learning rate of each trainable group at the scheduler's current step."""
    rates = {}
    for group, peak in phase.peak_learning_rates().items():
        rates[group] = float(scheduler.get_lr(rates_of(peak, phase)))
    return rates
