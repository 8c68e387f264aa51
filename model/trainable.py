"""Sort parameters into the three groups of the report's phases: vision tower, mergers, language model; adapters among them."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # names are looked at before torch is imported
    from torch import nn

ADAPTER = ".adapter."
"""Part of the name of every parameter of an adapter."""


def group_of(name: str) -> str:
    """Return the parameter group of a parameter by its name in the model: vision, merger or language.

    The mergers are the main one and the DeepStack ones: the report trains "the MLP merger" in its alignment phase, and the
    DeepStack mergers are as new as the main one at that point.
    """
    if name.startswith(("visual.merger.", "visual.deepstack_merger_list.")):
        return "merger"
    return "vision" if name.startswith("visual.") else "language"


def is_adapter(name: str) -> bool:
    """Return whether a parameter (by its name in the model) belongs to an adapter of model/lora.py."""
    return ADAPTER in name


def set_trainable(
    model: "nn.Module", groups: Iterable[str], may_train: Callable[[str], bool] = lambda name: True
) -> None:
    """Let only the parameters of `groups` receive gradients; call it before the model is wrapped.

    Args:
        model: to freeze the rest of.
        groups: of the phase.
        may_train: whether a parameter may, by its name: with adapters few others do.
    """
    chosen = set(groups)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = group_of(name) in chosen and may_train(name)
