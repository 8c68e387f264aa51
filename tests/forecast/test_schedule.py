"""What each stage of a pipeline does, in order. Reference: Megatron-core's own schedules, which run with recorders in place of
passes and messages."""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from visionloom.forecast.schedule import Action, Await, Pass, Pipeline, Start, Transfer
from visionloom.forecast.trace.events import SlotKind
from visionloom.tests.ranks import RankPool

PIPELINES = [
    Pipeline(1, 1, 1),
    Pipeline(1, 1, 3),
    Pipeline(2, 1, 1),
    Pipeline(2, 1, 5),
    Pipeline(4, 1, 2),
    Pipeline(4, 1, 4),
    Pipeline(4, 1, 9),
    Pipeline(8, 1, 16),
    Pipeline(2, 2, 2),
    Pipeline(2, 2, 6),
    Pipeline(2, 3, 8),
    Pipeline(3, 2, 3),
    Pipeline(4, 2, 4),
    Pipeline(4, 2, 8),
    Pipeline(4, 3, 16),
    Pipeline(8, 4, 24),
]


def recorded_actions(pipelines: list[Pipeline]) -> list[list[list[Action]]]:
    """Run on a rank of the pool, which has the stand-in for torch.cuda: Megatron-core's actions of each stage."""
    return [
        [megatron_actions(pipeline, stage) for stage in range(pipeline.stages)]
        for pipeline in pipelines
    ]


def megatron_actions(pipeline: Pipeline, stage: int) -> list[Action]:
    """What Megatron-core's schedule does on a stage."""
    import torch
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import ModelType

    actions: list[Action] = []
    backwards: Counter[int] = Counter()

    def group(size: int, rank: int = 0) -> Any:
        return SimpleNamespace(size=lambda: size, rank=lambda: rank)

    class Recorder(P2PCommunicator):  # type: ignore[misc]
        """Megatron-core's own, down to the call that sends and receives."""

        def __init__(self) -> None:
            self.pp_group, self.config = group(pipeline.stages, stage), config
            self.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size
            self.started: Counter[Transfer] = Counter()

        def _communicate(self, wait_on_reqs: bool = True, **flags: Any) -> Any:
            asked = {
                Transfer.SEND_NEXT: ("send_next", flags["tensor_send_next"] is not None),
                Transfer.RECEIVE_PREVIOUS: ("recv_prev", flags["recv_prev"]),
                Transfer.SEND_PREVIOUS: ("send_prev", flags["tensor_send_prev"] is not None),
                Transfer.RECEIVE_NEXT: ("recv_next", flags["recv_next"]),
            }
            requests = {}
            for transfer, (name, wanted) in asked.items():
                if wanted:
                    actions.append(Start(transfer))
                    waiting = Await(transfer, self.started[transfer])
                    requests[name] = SimpleNamespace(
                        wait=lambda waiting=waiting: actions.append(waiting)
                    )
                    self.started[transfer] += 1
            if wait_on_reqs:
                for request in requests.values():
                    request.wait()
            received = [
                torch.zeros(()) if flags[name] else None for name in ("recv_prev", "recv_next")
            ]
            return *received, requests

    def forward_step(*arguments: Any, **options: Any) -> Any:
        chunk = options.get("vp_stage") or 0
        actions.append(Pass(SlotKind.FORWARD, chunk, options["current_microbatch"]))
        # A tensor that says which chunk made it.
        output = torch.tensor(float(chunk))
        return output, torch.zeros([], dtype=torch.int)

    def backward_step(given: Any, output: Any, gradient: Any, config: Any) -> Any:
        chunk = int(output)
        actions.append(Pass(SlotKind.BACKWARD, chunk, backwards[chunk]))
        backwards[chunk] += 1
        return torch.zeros(())

    # The settings of model/language.py `_layout_settings`.
    several = pipeline.chunks > 1
    config = ModelParallelConfig(
        pipeline_model_parallel_size=pipeline.stages,
        virtual_pipeline_model_parallel_size=pipeline.chunks if several else None,
        pipeline_dtype=torch.float32,
        batch_p2p_comm=False,
        overlap_p2p_comm=several,
        deallocate_pipeline_outputs=True,
    )
    config.hidden_size = 1
    part = torch.nn.Module()
    part.config, part.model_type = config, ModelType.encoder_or_decoder
    options: dict[str, Any] = {
        "forward_step_func": None,
        "data_iterator": [None] * pipeline.chunks if several else None,
        "model": [part] * pipeline.chunks,
        "num_microbatches": pipeline.micro_batches,
        "seq_length": 1,
        "micro_batch_size": 1,
        "pg_collection": ProcessGroupCollection(
            tp=group(1), cp=group(1), embd=None, pos_embd=None, pp=group(1), dp_cp=group(1)
        ),
    }
    run: Callable[..., Any] = schedules.forward_backward_no_pipelining
    if pipeline.stages > 1:
        options["p2p_communicator"] = Recorder()
        run = (
            schedules.forward_backward_pipelining_with_interleaving
            if several
            else schedules.forward_backward_pipelining_without_interleaving
        )
    replaced = {
        "forward_step": forward_step,
        "backward_step": backward_step,
        "deallocate_output_tensor": lambda *_: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, function in replaced.items():
            patch.setattr(schedules, name, function)
        run(**options)
    return actions


def test_every_stage_does_what_megatron_does(pool: RankPool) -> None:
    (recorded,) = pool.run(1, recorded_actions, PIPELINES)
    for pipeline, stages in zip(PIPELINES, recorded, strict=True):
        ours = [pipeline.actions(stage) for stage in range(pipeline.stages)]
        assert ours == stages, pipeline


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_chunk_passes_every_micro_batch_once(pipeline: Pipeline) -> None:
    for stage in range(pipeline.stages):
        passes = pipeline.passes(stage)
        assert len(set(passes)) == len(passes) == 2 * pipeline.chunks * pipeline.micro_batches
