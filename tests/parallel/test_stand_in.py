"""The stand-in for torch.cuda: Megatron-core's own GPTModel trains on gloo in every kind of layout.

Nothing of visionloom's model or optimizer is used here, so a failure is the stand-in's. torch may be a CUDA build.
"""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.parallel import stand_in
from visionloom.tests.ranks import RankPool

LAYOUTS: dict[str, dict[str, int]] = {
    "data": {},
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "expert": {"expert_model_parallel_size": 2},
}
STEPS, MICRO_BATCHES, TOKENS, VOCABULARY = 3, 2, 16, 64


def transformer_config(layout: dict[str, int]) -> Any:
    from megatron.core.transformer import TransformerConfig

    experts: dict[str, Any] = {}
    if "expert_model_parallel_size" in layout:
        experts = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
        experts |= {
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "none",
        }
    return TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, normalization="RMSNorm", qk_layernorm=True,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False, bias_activation_fusion=False,
        hidden_dropout=0.1, use_cpu_initialization=True, pipeline_dtype=torch.float32, **layout, **experts,
    )  # fmt: skip


def build(layout: dict[str, int]) -> tuple[Any, Any]:
    """Megatron-core's GPTModel in its data-parallel wrapper, and its distributed optimizer."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = transformer_config(layout)
    config.finalize_model_grads_func = finalize_model_grads
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=True, num_experts=config.num_moe_experts
    )
    model = GPTModel(
        config, spec, VOCABULARY, TOKENS, position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip
    reduced = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    wrapped = DistributedDataParallel(config, reduced, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True), [wrapped]
    )
    return wrapped, optimizer


def forward(batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
    ids = next(batches)
    output = model(ids, torch.arange(TOKENS).expand_as(ids), None, labels=ids)
    return output, lambda losses: (
        losses.float().mean(),
        {"loss": float(losses.detach().float().mean())},
    )


def train(layout: dict[str, int]) -> list[float]:
    """Losses of a few steps on one batch, empty on ranks without the last stage; runs on every rank of the pool."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**layout)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    torch.manual_seed(1)
    wrapped, optimizer = build(layout)
    ids = torch.randint(
        0, VOCABULARY, (MICRO_BATCHES, 2, TOKENS), generator=torch.Generator().manual_seed(0)
    )
    losses = []
    for _ in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        done = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=iter(ids), model=[wrapped], num_microbatches=MICRO_BATCHES,
            seq_length=TOKENS, micro_batch_size=2, forward_only=False,
        )  # fmt: skip
        updated, norm, _ = optimizer.step()
        assert updated and norm > 0
        losses += [sum(part["loss"] for part in done) / len(done)] if done else []
    return losses


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_trains(layout: str, pool: RankPool) -> None:
    found = pool.run(2, train, LAYOUTS[layout])
    told = [losses for losses in found if losses]
    assert len(told) == (1 if layout == "pipeline" else 2)
    for losses in told:
        assert len(losses) == STEPS and losses[0] > losses[1] > losses[2] > 0, losses
        assert losses == pytest.approx(told[0], abs=1e-5)


def names() -> dict[str, int]:
    """Identity of everything that the stand-in replaces."""
    owners = {
        "torch.cuda": torch.cuda,
        "torch": torch,
        "torch.Tensor": torch.Tensor,
        "torch.nn.Module": torch.nn.Module,
    }
    found = {
        f"{path}.{name}": id(value)
        for path, owner in owners.items()
        for name, value in vars(owner).items()
    }
    return found | {"all_to_all_single": id(dist.all_to_all_single)}


def behaviour() -> dict[str, bool]:
    """What holds in a process with the stand-in; runs on a rank of the pool."""
    before = names()
    stand_in.install()
    torch.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    second = torch.rand(3)
    torch.cuda.manual_seed(5)
    third = torch.rand(3)
    output = torch.zeros(2)
    dist.all_to_all_single(output, torch.ones(2), torch.tensor([2]), torch.tensor([2]))
    with torch.device("meta"):
        built = torch.nn.Linear(2, 2)
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.Stream() as stream:
        stream.wait_stream(torch.cuda.current_stream())
        stream.wait_event(stream.record_event())
    example = torch.zeros(2)
    made = {
        "empty_like": torch.empty_like(example, device="cuda"),
        "ones_like": torch.ones_like(example, device="cuda"),
        "zeros_like": torch.zeros_like(example, device="cuda"),
        "full": torch.full((2,), 1.0, device="cuda"),
        "tensor": torch.tensor([1.0], device=torch.device("cuda", 0)),
        "arange": torch.arange(3, device="cuda:0"),
        **{
            name: getattr(torch, name)(2, device="cuda")
            for name in ("empty", "ones", "rand", "randn", "zeros")
        },
    }
    return {
        "installed": stand_in.installed(),
        "no GPU": not torch.cuda.is_available() and not torch.cuda.is_initialized(),
        "installing twice changes nothing": names() == before,
        "current device": torch.cuda.current_device() == torch.device("cpu"),
        "factories": made.keys() == set(stand_in.FACTORIES)
        and all(x.device.type == "cpu" for x in made.values()),
        "other devices": torch.zeros(1, device="meta").is_meta and built.weight.is_meta,
        "moving": example.cuda() is example
        and torch.nn.Linear(1, 1).cuda().weight.device.type == "cpu",
        "type names": (example.type(), example.half().type())
        == ("torch.cuda.FloatTensor", "torch.cuda.HalfTensor"),
        "conversion by type": example.type(torch.float64).dtype == torch.float64,
        "random states": torch.equal(first, second) and torch.equal(first, third),
        "split sizes as tensors": output.tolist() == [1.0, 1.0],
        "events": torch.cuda.Event().query()
        and torch.cuda.Event().elapsed_time(torch.cuda.Event()) == 0.0,
        "memory": torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == 0,
    }


def test_every_replaced_name_works(pool: RankPool) -> None:
    (found,) = pool.run(1, behaviour)
    assert [what for what, holds in found.items() if not holds] == []


def test_the_compiler_and_wandb_are_not_imported() -> None:
    """They take longer than Megatron-core, and whoever wants them later still has them."""
    script = "from visionloom.parallel import stand_in; stand_in.install(); import sys, torch, megatron.core.optimizer;"
    script += "print('wandb' in sys.modules, 'torch._inductor.compile_fx' in sys.modules, torch.compile.__module__);"
    script += "import wandb"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "torch"]
