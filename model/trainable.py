"""The three parameter groups of the report's phases: vision tower, mergers, language model."""

from collections.abc import Iterable

from torch import nn


def group_of(name: str) -> str:
    """The parameter group of a parameter by its name in the model.

    The mergers are the main one and the DeepStack ones: the report trains "the MLP merger" in its alignment phase, and the
    DeepStack mergers are as new as the main one at that point.
    """
    if name.startswith(("visual.merger.", "visual.deepstack_merger_list.")):
        return "merger"
    return "vision" if name.startswith("visual.") else "language"


def set_trainable(model: nn.Module, groups: Iterable[str]) -> None:
    """Let only the parameters of `groups` receive gradients; call it before the model is wrapped for data parallelism."""
    chosen = set(groups)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = group_of(name) in chosen
