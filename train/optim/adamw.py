"""torch's AdamW as Megatron-core's distributed optimizer needs it."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.Optimizer):
    """torch's AdamW with the step count in the parameter group, as TransformerEngine's FusedAdam keeps it.

    Megatron-core 0.19 with torch's own AdamW cannot load into a fresh process, loses `step` in layout-free checkpoints,
    shares one step tensor between all parameters after loading (each update then counts once a parameter), and cannot
    save a rank without trainable parameters. All four expect a count for each parameter; this class has none.
    """

    moment_dtype: torch.dtype | None = None
    """Of the moments; None: the parameter's."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            self.update_group(group)

    def update_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient."""
        parameters, gradients, first, second = [], [], [], []
        for parameter in group["params"]:
            if parameter.grad is not None:
                mean, mean_of_squares = self.moments_of(parameter, group)
                parameters.append(parameter)
                gradients.append(parameter.grad)
                first.append(mean)
                second.append(mean_of_squares)
        if not parameters:
            return

        done = int(group.get("step") or 0)
        group["step"] = done + 1
        # One element each of one tensor: torch's kernel advances the counts in place.
        counts = torch.full((len(parameters),), float(done), device=parameters[0].device)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            first,
            second,
            [],
            list(counts.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def make_moments(self) -> None:
        """Give every parameter its moments, zero until its first update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.moments_of(parameter, group)

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the moments of a group's parameters, which are theirs in checkpoints too.

        These are the means of a parameter's gradients and of their squares; Megatron-core reads them under torch's names.
        """
        return "exp_avg", "exp_avg_sq"

    def moments_of(self, parameter: Tensor, group: dict[str, Any]) -> list[Tensor]:
        """Return the moments of a parameter, of its shape, in the order of `moment_names`."""
        state = self.state[parameter]
        for name in self.moment_names(group):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=self.moment_dtype)
        return [state[name] for name in self.moment_names(group)]
