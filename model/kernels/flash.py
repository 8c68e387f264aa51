"""Choose the GPU's kernel of attention and call it: FlashAttention of torch or of a package, or in fp32 torch's efficient one.

cuDNN's kernels are never chosen: for each new number and length of segments they build a plan, some 50 ms, and every pack has
others. A step of 2B with its kernels over variable lengths did not end in 45 s on an H100 (torch 2.11, measured).
"""

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.model.config import ATTENTIONS

PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
"""Where each package's kernels are."""
REGISTERED = {"flash3": "FA3", "flash4": "FA4"}
"""Their names in torch's registry, which puts them in the place of its own."""
CAUSAL_FROM_LAST = 2
"""Mask of torch's efficient kernel: the last query sees all keys."""


@dataclass
class _Chosen:
    """The kernels of this process."""

    name: str = "torch"


def chosen() -> str:
    """Return the name of the kernels of this process."""
    return _chosen.name


_chosen = _Chosen()


def choose(wanted: str, device: torch.device) -> None:
    """Choose the kernels of this process for `model.attention`.

    `auto` takes torch's own, which need no package: FlashAttention-3 where it is installed and the GPU is a Hopper.

    Raises:
        UserError: if the package of the kernels that are asked for is not installed, or cannot run on this GPU.
    """
    assert wanted in ATTENTIONS
    if device.type != "cuda":
        return
    name = wanted
    if wanted == "auto":
        # FlashAttention-3's kernels are written for Hopper's instructions and run nowhere else.
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        name = "flash3" if hopper and _installed("flash3") else "torch"
    if name == _chosen.name:
        return
    if name in PACKAGES and not _installed(name):
        raise UserError(
            f"model.attention={name} needs the package of {PACKAGES[name]}, which is not installed:"
            " install it, or use model.attention=auto"
        )
    _activate(name)
    _chosen.name = name


def _installed(name: str) -> bool:
    """Return whether the package of some kernels is there, without importing it."""
    # A submodule cannot be looked up before its package is known to be there.
    package, _, inside = PACKAGES[name].partition(".")
    if importlib.util.find_spec(package) is None:
        return False
    return not inside or importlib.util.find_spec(PACKAGES[name]) is not None


def _activate(name: str) -> None:
    """Put kernels of torch's registry in the place of its own, or take them back."""
    from torch.nn import attention

    # torch replaces its kernels for the whole process: the former go first.
    if _chosen.name in REGISTERED:
        attention.restore_flash_attention_impl()
    if name in REGISTERED:
        try:
            attention.activate_flash_attention_impl(REGISTERED[name])
        except (ImportError, RuntimeError) as error:
            raise UserError(f"model.attention={name}: {error}; use model.attention=auto") from error


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor]:
    """Return output and logsumexp of attention; arguments are the operation's."""
    _bounds_q, _bounds_k, max_q, max_k, causal, scale = others
    # FlashAttention has half precision only.
    if query.dtype == torch.float32:
        return _efficient_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, *others)
    if _chosen.name == "flash2":
        return _package_forward(query, key, value, cu_seqlens_q, cu_seqlens_k, *others)
    # torch's public varlen_attn calls the same kernel, but prefers cuDNN's.
    output, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        0.0,
        causal,
        False,
        scale=scale,
    )
    return output, logsumexp


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; arguments are the operation's."""
    cu_seqlens_q, cu_seqlens_k, _bounds_q, _bounds_k, max_q, max_k, causal, scale = others
    inputs = gradient.contiguous(), query, key, value, output, logsumexp
    if query.dtype == torch.float32:
        return _efficient_backward(inputs, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal, scale)
    if _chosen.name == "flash2":
        return _package_backward(inputs, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal, scale)
    # Random states of a dropout that there is not.
    unused = torch.empty(2, dtype=torch.uint64, device=query.device)
    by_query, by_key, by_value = torch.ops.aten._flash_attention_backward(
        *inputs,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        0.0,
        causal,
        unused,
        unused,
        scale=scale,
    )
    return by_query, by_key, by_value


# ---- flash-attn 2, the package


def _package_forward(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    cu_seqlens_q, cu_seqlens_k, _bounds_q, _bounds_k, max_q, max_k, causal, scale = others
    output, logsumexp, *_ = _flash_attn_varlen_forward(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
    )
    return output, logsumexp


def _package_backward(inputs: tuple[Tensor, ...], *others: Any) -> Any:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal, scale = others
    made = tuple(torch.empty_like(x) for x in inputs[1:4])
    _flash_attn_varlen_backward(
        *inputs,
        *made,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return made


# ---- fp32, which FlashAttention does not have


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
    cu_seqlens_q, cu_seqlens_k, _bounds_q, _bounds_k, max_q, max_k, causal, scale = others
    output, logsumexp, *_ = torch.ops.aten._efficient_attention_forward(
        query.unsqueeze(0),
        _repeated(key, query).unsqueeze(0),
        _repeated(value, query).unsqueeze(0),
        None,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        0.0,
        CAUSAL_FROM_LAST if causal else 0,
        True,
        scale=scale,
    )
    return output.squeeze(0), logsumexp


def _efficient_backward(inputs: tuple[Tensor, ...], *others: Any) -> Any:
    gradient, query, key, value, output, logsumexp = inputs
    cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal, scale = others
    unused = torch.empty((), dtype=torch.int64, device=query.device)
    by_query, by_key, by_value, _ = torch.ops.aten._efficient_attention_backward(
        gradient.unsqueeze(0),
        query.unsqueeze(0),
        _repeated(key, query).unsqueeze(0),
        _repeated(value, query).unsqueeze(0),
        None,
        output.unsqueeze(0),
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        logsumexp,
        0.0,
        unused,
        unused,
        CAUSAL_FROM_LAST if causal else 0,
        False,
        scale=scale,
    )
    return by_query.squeeze(0), _summed(by_key, key), _summed(by_value, value)


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Repeat key or value heads [U, G, D] to those of the queries: the efficient kernel wants as many."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _summed(gradient: Tensor, x: Tensor) -> Tensor:
    """Add up the gradients [1, U, H, D] of repeated heads to [U, G, D]."""
    groups = x.shape[1]
    return gradient.squeeze(0).unflatten(1, (groups, -1)).sum(2)
