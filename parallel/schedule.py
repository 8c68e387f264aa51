"""Run the micro-batches of a step through the parts of a model, in the order that the layout asks for."""

from collections.abc import Callable, Sequence
from typing import Any

from visionloom.parallel.topology import Topology


def run_schedule(
    forward: Callable[..., Any],
    parts: Sequence[Any],
    batches: Sequence[Any],
    topology: Topology,
    forward_only: bool,
    **options: Any,
) -> list[Any]:
    """Run Megatron-core's schedule for this layout over all micro-batches; return what the last stage collected, empty elsewhere.

    Args:
        forward: called with an iterator over `batches` and a part of the model.
        parts: of the model on this stage, wrapped for data parallelism or not.
        batches: alike on all stages, with `input_ids`.
        topology: the layout.
        forward_only: without a backward pass.
        options: of the schedule.
    """
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    outputs: list[Any] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(batches) for _ in parts] if len(parts) > 1 else iter(batches),
        model=list(parts),
        num_microbatches=len(batches),
        # Megatron-core divides it by its own context axis.
        seq_length=batches[0].input_ids.numel() * topology.separate_contexts,
        micro_batch_size=1,
        forward_only=forward_only,
        # Without pipeline stages the groups can be given; with them Megatron-core takes its own.
        pg_collection=topology.groups if topology.config.pipeline == 1 else None,
        **options,
    )
    return outputs


def whole_rounds[Batch](
    batches: Sequence[Batch], topology: Topology, filler: Batch | None = None
) -> list[Batch]:
    """Add batches until interleaved stages can share them evenly: copies of `filler`, or of the first, whose results are nobody's."""
    if topology.config.chunks == 1:
        return list(batches)
    missing = -len(batches) % topology.config.pipeline
    return [*batches, *[filler or batches[0]] * missing]
