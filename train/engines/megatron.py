"""Megatron-core's data parallelism and distributed optimizer (ZeRO-1), the engine for every layout."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from visionloom.data.stream.batch import PackedBatch
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.parts import OPTIMIZER, REDUCTION, in_part
from visionloom.parallel.schedule import run_schedule
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.weights_state import Weights
from visionloom.train.engines.engine import Owned
from visionloom.train.overlap import gather_weights


class MegatronEngine:
    """Megatron-core's DDP around each part of the model, and its optimizer."""

    has_whole_weights = True

    def __init__(
        self, model_parts: list[Qwen3VL], parts: list[Any], optimizer: Any, topology: Topology
    ) -> None:
        """Take parts of the model, the same `parts` in Megatron's DDP, and what `build_optimizer` has made of these."""
        self.model_parts = model_parts
        self.parts = parts
        self.optimizer = optimizer
        self.topology = topology

    def clear(self) -> None:
        """Begin a step without gradients; see Engine."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        for part in self.parts:
            part.zero_grad_buffer()

    def accumulate(self, forward: Callable[..., Any], batches: Sequence[PackedBatch]) -> None:
        """Run Megatron-core's schedule of the layout; see Engine."""
        for part in self.model_parts:
            part.config.finalize_model_grads_func = reduce_gradients
        run_schedule(forward, self.parts, batches, self.topology, forward_only=False)

    @in_part(OPTIMIZER)
    def scale(self, factor: Tensor) -> None:
        """Multiply the stretches of the gradients that the optimizer owns by a number, in the buffers; see Engine."""
        if self.optimizer is None:
            # Each rank has all gradients, and whoever asked for them reads them from the buffers.
            for part in self.parts:
                part.scale_gradients(factor)
            return
        # Makes each main parameter's gradient a view of its stretch, for buffers are fp32 as it is.
        self.optimizer.prepare_grads()
        if gradients := [parameter.grad for parameter in self.optimizer.get_parameters()]:
            torch._foreach_mul_(gradients, factor)

    @in_part(OPTIMIZER)
    def gradient_norm(self) -> float:
        """Return the global norm of the gradients, which the main parameters have since `scale`; see Engine."""
        return float(self.optimizer.get_grad_norm())

    @in_part(OPTIMIZER)
    def update(self, norm: float) -> None:
        """Clip the gradients, whose norm is given, and apply them; see Engine."""
        for inner in self.optimizer.chained_optimizers:
            clip = inner.config.clip_grad  # 0 turns it off
            if clip > 0.0 and inner.get_parameters():
                clip_grad_by_total_norm_fp32(inner.get_parameters(), max_norm=clip, total_norm=norm)
        self.optimizer.step_with_ready_grads()

    def drop(self) -> None:
        """Do nothing: the next step clears the gradients; see Engine."""

    def gather_weights(self) -> None:
        """Gather the weights that other ranks have updated; see Engine."""
        gather_weights(self.parts)

    def whole_weights(self) -> AbstractContextManager[None]:
        """Gather the weights that other ranks have updated; see Engine."""
        self.gather_weights()
        return nullcontext()

    @property
    def updates(self) -> int:
        """Return the updates made so far, by which AdamW corrects its moments."""
        most = 0
        for inner in self._optimizers():
            for group in inner.optimizer.param_groups:
                most = max(most, int(group.get("step") or 0))
        return most

    def weights(self) -> Weights:
        """Return the weights, of which each rank has its parameters whole; see Engine."""
        return Weights.of(self.model_parts, self.topology)

    def owned(self) -> Iterator[Owned]:
        """Yield the stretches that the distributed optimizer gives this rank; see Engine.

        Megatron-core's own state of an optimizer also holds its parameter groups, which differ with the layout: without experts
        on ranks of their own there is one optimizer, with them there are two. All that a group knows is derived: the learning
        rate from the schedule, and the number of updates from `updates`.
        """
        for inner in self._optimizers():
            inner.optimizer.make_moments()  # a fresh one has none to read into or to save
            for buffer in inner.gbuf_ranges:
                for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
                    for parameter, ranges in bucket["param_map"].items():
                        # The master copy is `param`; the moments have torch's names.
                        values = inner._get_main_param_and_optimizer_states(parameter)
                        detached = {kind: each.detach() for kind, each in values.items()}
                        yield Owned(parameter, ranges["param"].start, detached)

    def loaded(self, updates: int) -> None:
        """Take over the count of updates; see Engine."""
        for inner in self._optimizers():
            for group in inner.optimizer.param_groups:
                group["step"] = updates

    def close(self) -> None:
        """Do nothing: wrapper and optimizer go with the model; see Engine."""

    def _optimizers(self) -> Iterator[Any]:
        """Yield Megatron's distributed optimizers that have parameters: a stage may train none."""
        for inner in self.optimizer.chained_optimizers:
            is_stub = getattr(inner, "is_stub_optimizer", False)
            if not is_stub and inner.optimizer.param_groups:
                yield inner


@in_part(REDUCTION)
def reduce_gradients(parts: list[Any], num_tokens: Any, **options: Any) -> None:
    """Add up gradients over the ranks and leave the division to us: Megatron-core counts tokens, the loss has weights."""
    finalize_model_grads(parts, None, **options)
