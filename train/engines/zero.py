"""DeepSpeed's ZeRO: optimizer, gradients and weights divided among the data-parallel ranks, in memory of the device, host or disk.

DeepSpeed flattens the parameters and gives each rank a stretch: at stage 3 of every parameter, at stages 1 and 2 of all that are
updated alike. It divides gradients by the number of data ranks, clips by a norm of its own and skips no step; all three are
undone or done here, so that a step is the same as Megatron-core's.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.data.stream.batch import PackedBatch
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.trainable import group_of
from visionloom.parallel.config import ZeroConfig
from visionloom.parallel.divided import shape_of
from visionloom.parallel.on_disk import gather
from visionloom.parallel.parts import OPTIMIZER, in_part
from visionloom.parallel.schedule import run_schedule
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.weights_state import Weights
from visionloom.train.engines import nvme
from visionloom.train.engines.engine import WEIGHT, Owned, divided_weights
from visionloom.train.optim.config import OptimConfig
from visionloom.train.optimizer import rates_of
from visionloom.train.phase.config import PhaseConfig

HEAD_NORMS = "q_layernorm.weight", "k_layernorm.weight"
MOMENTS = "exp_avg", "exp_avg_sq"
EVALUATION = -1
"""Stands among the modules that need a weight, which DeepSpeed numbers from 0."""
INITIAL_MICRO_STEP_ID = -1
"""DeepSpeed's number of a micro-batch before the first of a step, at stages 1 and 2."""


class ZeroEngine:
    """DeepSpeed's engine around the model, with torch's AdamW inside."""

    def __init__(
        self, model_parts: list[Qwen3VL], topology: Topology, optim: OptimConfig, phase: PhaseConfig
    ) -> None:
        """Divide a model, whose frozen parameters are marked, among the ranks.

        Raises:
            UserError: if DeepSpeed is not installed.
        """
        deepspeed = import_deepspeed(topology.device)
        (self.model,) = model_parts
        self.topology = topology
        self.stage = topology.config.zero.stage
        self.has_whole_weights = not topology.config.divides_weights
        if topology.config.tensor > 1:
            add_up_head_norms(self.model, topology)
        groups = parameter_groups(self.model, optim, phase)
        # At stage 1 DeepSpeed has another optimizer for bf16, which is not divided as that of stage 2 is.
        alike = patch.object(
            deepspeed.DeepSpeedEngine,
            "_do_optimizer_sanity_check",
            lambda engine, optimizer: deepspeed.runtime.engine.ZERO_OPTIMIZATION,
        )
        with alike:
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self.model,
                optimizer=optimizer_of(groups, optim),
                config=settings_of(topology, optim, groups[0]["params"][0].dtype),
                mpu=Groups(topology),
            )
        if topology.config.zero.offload_optimizer == "nvme":
            nvme.keep_gradients(self.optimizer)
        # Of stage 3 they are named once.
        self._named = Weights.of(model_parts, topology)
        self.parts = [Called(self.engine)]
        self.updates = 0
        self._factor = 1.0
        """By which the gradients are still to be multiplied."""

    def clear(self) -> None:
        """Do nothing: an update, or a step that is dropped, leaves no gradients; see Engine."""

    def accumulate(self, forward: Callable[..., Any], batches: Sequence[PackedBatch]) -> None:
        """Run one micro-batch after the other; the last one's backward pass ends the reduction; see Engine."""
        self.model.config.finalize_model_grads_func = nothing_to_reduce
        for number, batch in enumerate(batches, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(batches))
            run_schedule(forward, self.parts, [batch], self.topology, forward_only=False)

    def scale(self, factor: Tensor) -> None:
        """Keep the number until the host reads it with the norm; see Engine."""
        self._factor_on_device = factor

    @in_part(OPTIMIZER)
    def gradient_norm(self) -> float:
        """Return the global norm of the gradients; see Engine."""
        # DeepSpeed has divided the sum over the data ranks by their number.
        factor = float(self._factor_on_device) * self.topology.data_size
        # Without a weight there is no gradient either.
        self._factor = factor or 1.0
        optimizer = self.optimizer
        if self.stage < 3:
            norm = optimizer.scaled_global_norm()
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(optimizer._get_norm_groups())
        norm = float(norm)
        # A norm below 0 is DeepSpeed's mark of one that is not finite.
        return norm * self._factor if norm >= 0 else math.inf

    @in_part(OPTIMIZER)
    def update(self, norm: float) -> None:
        """Let DeepSpeed clip and apply the gradients; see Engine."""
        # It divides by the scale of the loss before it clips; only here, or it would multiply the loss by it too.
        self.optimizer.custom_loss_scaler, self.optimizer.external_loss_scale = (
            True,
            1 / self._factor,
        )
        self.optimizer.step()
        self.optimizer.custom_loss_scaler = False
        self.optimizer.zero_grad()
        self.updates += 1

    @in_part(OPTIMIZER)
    def drop(self) -> None:
        """Forget the gradients, as DeepSpeed does where they overflow; see Engine."""
        optimizer = self.optimizer
        optimizer.zero_grad(set_to_none=True)
        if self.stage == 3:
            optimizer._pre_step()
            optimizer.averaged_gradients = {}
        else:
            optimizer.micro_step_id = INITIAL_MICRO_STEP_ID
            optimizer._release_preflattened_grad_buffers()
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        if self.topology.config.zero.offload_optimizer != "none":
            optimizer.reset_cpu_buffers()

    def gather_weights(self) -> None:
        """Do nothing: an update gathers the weights, or at stage 3 each rank keeps its own; see Engine."""

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Have at stage 3 all weights on each rank: data ranks evaluate samples of their own, and meet in no layer; see Engine."""
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import partitioned_param_coordinator as coordinators

        parameters = list(self.model.parameters())
        gather(parameters)
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(EVALUATION)
        try:
            # At each call ranks would compare which modules they have called, and each calls the model as often as it needs to.
            with patch.object(coordinators, "assert_ints_same_as_other_ranks"):
                yield
        finally:
            coordinator = self.optimizer._get_param_coordinator()
            # Nor do they say anything of the next step.
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(EVALUATION)
            parameters[0].partition(parameters)
            self._gather_small()

    def weights(self) -> Weights:
        """Return the weights; at stage 3 what remains shared is no parameter; see Engine."""
        if self.stage < 3:
            return Weights.of([self.model], self.topology)
        # Copies: a save notes in them who writes what.
        shared = {
            part: {name: copy(each) for name, each in state.items()}
            for part, state in self._named.shared.items()
        }
        return Weights(shared, self._named.pieces)

    def owned(self) -> Iterator[Owned]:
        """Yield DeepSpeed's stretches of the flattened parameters; see Engine."""
        self._make_moments()
        return self._stretches() if self.stage == 3 else self._fragments()

    def _fragments(self) -> Iterator[Owned]:
        """Yield the stretches of stages 1 and 2, of parameters that are updated."""
        for parameter in self.model.parameters():
            fragment = getattr(parameter, "_hp_mapping", None)
            if fragment is None:
                continue
            flat = self.optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
            place = fragment.hp_fragment_address
            begin = fragment.lp_fragment_address.start
            yield Owned(parameter, begin, self._values(flat, place.start, place.numel))

    def _stretches(self) -> Iterator[Owned]:
        """Yield the stretches of stage 3: of each parameter, this rank's of as many equal ones as there are ranks."""
        # Weights under adapters are in no checkpoint.
        for owned in divided_weights(self._named.pieces):
            values = owned.values
            if owned.parameter.requires_grad:
                group, offset, _ = self.optimizer.grad_position[
                    self.optimizer.get_param_id(owned.parameter)
                ]
                flat = self.optimizer.fp32_partitioned_groups_flat[group]
                values = values | self._values(flat, offset, len(values[WEIGHT]))
            yield replace(owned, values=values)

    def _values(self, flat: Tensor, begin: int, count: int) -> dict[str, Tensor]:
        """Return master weights and moments of a stretch of a flat buffer."""
        if nvme.is_group_on_disk(self.optimizer, flat):
            whole = nvme.group_on_disk(self.optimizer, flat, ("param", *MOMENTS))
        else:
            state = self.optimizer.optimizer.state[flat]
            whole = {"param": flat, **{name: state[name] for name in MOMENTS}}
        return {kind: values.detach()[begin : begin + count] for kind, values in whole.items()}

    def _make_moments(self) -> None:
        """Give each flat buffer the state that torch's AdamW would give it at its first update."""
        for flat in self._buffers():
            state = self.optimizer.optimizer.state[flat]
            if state:
                continue
            with nvme.in_host_memory(self.optimizer, flat):
                state["step"] = torch.tensor(float(self.updates))
                for name in MOMENTS:
                    state[name] = torch.zeros_like(flat)

    def _buffers(self) -> list[Tensor]:
        """Return the flat buffers of master weights."""
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def loaded(self, updates: int) -> None:
        """Take over the count of updates, and gather at stage 3 the small weights that each rank has whole; see Engine."""
        self.updates = updates
        for flat in self._buffers():
            self.optimizer.optimizer.state[flat]["step"].fill_(float(updates))
        if self.stage == 3:
            self._gather_small()

    def _gather_small(self) -> None:
        """Gather anew the small weights that each rank has whole all the time."""
        if small := self.optimizer.persistent_parameters:
            small[0].partition(small)
            small[0].all_gather(small)

    def close(self) -> None:
        """Take DeepSpeed's hooks from the model, and what it keeps of it in its modules; see Engine."""
        from deepspeed.runtime.zero import parameter_offload
        from deepspeed.utils import groups

        self.engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()
        groups.mpu = None
        if nvme.uses_disk(self.topology.config.zero):
            nvme.remove_files(self.topology.config.zero, self.model.parameters())


@contextmanager
def divided_when_made(topology: Topology, optim: OptimConfig, dtype: torch.dtype) -> Iterator[None]:
    """Divide at stage 3 each parameter of a model as soon as its layer is made, so that no rank ever has the model whole.

    Raises:
        UserError: if DeepSpeed is not installed.
    """
    deepspeed = import_deepspeed(topology.device)
    making = deepspeed.zero.Init(
        data_parallel_group=topology.groups.dp,
        # Has the type of the weights: a `dtype` beside it is ignored where the device has no fp16, and buffers would be bf16.
        config_dict_or_path=settings_of(topology, optim, dtype),
        mpu=Groups(topology),
        # It would change the type and device of all tensors that are made, buffers of fp32 among them.
        tensor_overrides=(),
        enabled=topology.config.divides_weights,
    )
    with nvme.enough_room(topology.config.zero), making:
        yield


class Called:
    """DeepSpeed's engine as Megatron-core's schedule calls it, which looks for the settings of the model in what it calls."""

    def __init__(self, engine: Any) -> None:
        """Take the engine; `module` is the model."""
        self.engine, self.module = engine, engine.module

    def __call__(self, inputs: Any) -> Any:
        """Run the forward pass."""
        return self.engine(inputs)


class Groups:
    """The ranks of a layout by the names of Megatron-LM's mpu, which DeepSpeed asks; its own would outlive the layout."""

    def __init__(self, topology: Topology) -> None:
        """Answer for a layout."""
        self.groups = topology.groups

    def get_model_parallel_group(self) -> Any:
        """Return the ranks that share each matrix."""
        return self.groups.tp

    def get_model_parallel_rank(self) -> int:
        """Return the place of this rank among them."""
        return int(self.groups.tp.rank())

    def get_model_parallel_world_size(self) -> int:
        """Return their number."""
        return int(self.groups.tp.size())

    def get_data_parallel_group(self) -> Any:
        """Return the ranks with the same part of the model."""
        return self.groups.dp

    def get_data_parallel_rank(self) -> int:
        """Return the place of this rank among them."""
        return int(self.groups.dp.rank())

    def get_data_parallel_world_size(self) -> int:
        """Return their number."""
        return int(self.groups.dp.size())


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device; UserError if it is not installed."""
    # Else it would take the stand-in for torch.cuda for a GPU.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # It asks for the number of the device in each step; launchers other than torchrun may not set it.
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "parallel.engine=deepspeed needs DeepSpeed: pip install 'visionloom[deepspeed]', or choose parallel.engine=megatron"
        ) from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # On CPUs it would compile a reduction of its own at each machine's first start, for inference only.
    with patch("deepspeed.comm.torch.build_shm_op", lambda: None):
        deepspeed.init_distributed(
            dist_init_required=False if deepspeed.comm.is_initialized() else None
        )
    return deepspeed


def parameter_groups(
    model: Qwen3VL, optim: OptimConfig, phase: PhaseConfig
) -> list[dict[str, Any]]:
    """Return the parameters that train by learning rate and decay, with what Megatron-core's schedule reads of a group."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    peaks = phase.peak_learning_rates()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group, is_decayed = group_of(name), len(shape_of(parameter)) > 1
        settings = rates_of(peaks[group], phase) | {"wd_mult": float(is_decayed), "lr": 0.0}
        groups.setdefault((group, is_decayed), {"params": [], **settings})["params"].append(
            parameter
        )
    return list(groups.values())


def add_up_head_norms(model: Qwen3VL, topology: Topology) -> None:
    """Add up the gradients of the norms of queries and keys over the tensor ranks, each of which has some of the heads.

    Megatron-core does so at the end of a step, with all else that DeepSpeed's reduction takes the place of.
    """

    def add_up(gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total, group=topology.groups.tp)
        return total

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith(HEAD_NORMS):
            parameter.register_hook(add_up)


def optimizer_of(groups: list[dict[str, Any]], optim: OptimConfig) -> Any:
    """Return AdamW over groups of parameters."""
    return torch.optim.AdamW(
        groups,
        betas=(optim.beta1, optim.beta2),
        eps=optim.epsilon,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def settings_of(topology: Topology, optim: OptimConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": optim.clip_grad,
        "bf16": {"enabled": dtype == torch.bfloat16},
        # As Megatron-core's: added up and sent in fp32.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero_settings(topology.config.zero, dtype),
    }


def zero_settings(zero: ZeroConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the part of DeepSpeed's configuration that is about ZeRO; all ranks call it."""
    disk = nvme.disk_settings(zero, dtype)
    # DeepSpeed counts elements: gradients are fp32, weights at most.
    elements = zero.bucket_bytes // 4
    settings: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
        "stage3_prefetch_bucket_size": elements,
        # It would replace torch's linear function for the whole process.
        "memory_efficient_linear": False,
        # A layer at a time, and not as many as fit into a number.
        "stage3_max_live_parameters": elements,
    }
    for name, place in (
        ("offload_optimizer", zero.offload_optimizer),
        ("offload_param", zero.offload_parameters),
    ):
        if place != "none":
            settings[name] = {"device": place, "pin_memory": torch.cuda.is_available()}
            settings[name] |= disk.pop(name, {})
    return settings | disk


def nothing_to_reduce(*_: Any, **__: Any) -> None:
    """Stand in for Megatron-core's reduction: DeepSpeed has its own."""
