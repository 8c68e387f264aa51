"""Time a train step of transformers' Qwen3-VL on this machine's GPU, on the packs that step.py times ours on.

    python benchmarks/gpu/peer.py +recipe=full/qwen3vl_2b parallel=single

At its best: attention by torch's FlashAttention over variable lengths for text and pictures (transformers' own sdpa would let samples see
each other), Liger's kernels where the package is installed (rotary, RMSNorm, cross-entropy without logits; 0.8.5 takes `swiglu` and ignores it), fused AdamW.
Weights, gradients and moments are bf16 there, as people train with it; ours keeps fp32 copies, gradients and moments.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from step import UNCOUNTED, synchronize
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from visionloom.data.encode.patches import VIDEO_ROW, widen
from visionloom.data.stream.batch import PackedBatch
from visionloom.forecast.packs import PackChoice, packs_for, with_content
from visionloom.launch.configure import compose
from visionloom.model.flops import step_flops
from visionloom.parallel.share import ALONE
from visionloom.tests.model.reference import huggingface_model
from visionloom.train.config import RunConfig
from visionloom.train.observe.metrics import peak_flops
from visionloom.train.step_sums import StepCounts

NAME = "flash_attention_of_torch"
"""transformers gives a kernel with this beginning the boundaries of pictures."""


class TextSegments:
    """The boundaries of the samples of the pack that is being trained on."""

    bounds: Tensor
    longest: int = 0


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend from [1, heads, T, D] inside segments, as transformers calls its kernels; return [1, T, heads, D]."""
    bounds = options.get("cu_seq_lens_q")
    causal = bounds is None
    longest = options.get("max_length_q")
    if causal:
        bounds, longest = TextSegments.bounds, TextSegments.longest
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    output = Flash.apply(query, key, value, bounds, int(longest), causal, options["scaling"])
    return output.unsqueeze(0), None


class Flash(torch.autograd.Function):
    """torch's FlashAttention; of one head for several, as its kernel has it."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Tensor:
        """Attend; options are boundaries, the longest segment, whether it is causal, and the scale."""
        bounds, longest, causal, scale = options
        flash = torch.ops.aten._flash_attention_forward
        made = flash(
            query, key, value, bounds, bounds, longest, longest, 0.0, causal, False, scale=scale
        )
        output, sums, first, second, _ = made
        ctx.save_for_backward(query, key, value, output, sums, first, second)
        ctx.options = options
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        *saved, first, second = ctx.saved_tensors
        bounds, longest, causal, scale = ctx.options
        made = torch.ops.aten._flash_attention_backward(
            gradients[0].contiguous(), *saved, bounds, bounds, longest, longest, 0.0, causal,
            first, second, scale=scale,
        )  # fmt: skip
        return (*made, None, None, None, None)


def arguments_of(batch: PackedBatch, image_token: int, device: torch.device) -> dict[str, Any]:
    """Return a pack as transformers' model takes it."""
    ids = batch.input_ids.clone()
    ids[ids == image_token] = 0
    ids[batch.visual_rows] = image_token
    # It shifts labels by itself.
    labels = torch.full_like(batch.labels, -100)
    labels[1:] = batch.labels[:-1]
    patches = torch.from_numpy(widen(batch.patches.numpy(), VIDEO_ROW)).to(device)
    return {
        "input_ids": ids[None].to(device),
        "labels": labels[None].to(device),
        "position_ids": batch.position_ids[:, None].long().to(device),
        "pixel_values": (patches.float() / 127.5 - 1.0).to(torch.bfloat16),
        "image_grid_thw": batch.grid_thw.long().to(device),
        "use_cache": False,
    }


def build(config: RunConfig, device: torch.device) -> tuple[PreTrainedModel, bool]:
    """Return transformers' model in bf16 with random weights, and whether Liger's kernels are in it."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    if has_liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_vl

        apply_liger_kernel_to_qwen3_vl(swiglu=True)
    with device:
        model = huggingface_model(config.model).to(torch.bfloat16)
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._attn_implementation = NAME
    return model.train(), has_liger


def progress(name: str, begun: float) -> None:
    """Print the seconds since a beginning, on standard error at once."""
    print(f"{name}: {time.perf_counter() - begun:.2f} s", file=sys.stderr, flush=True)


def measure(config: RunConfig, steps: int) -> dict[str, Any]:
    """Return times, memory and utilisation of steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begun = time.perf_counter()
    phase = next(iter(config.phases))
    settings = config.phases[phase]
    packs = packs_for(config, phase, 1, [PackChoice.MEAN])[PackChoice.MEAN]
    batch = with_content(packs.batch(ALONE), config.model.text.vocab_size, 0)
    model, has_liger = build(config, device)
    arguments = arguments_of(batch, model.config.image_token_id, device)
    TextSegments.bounds = batch.cu_seqlens.to(device, torch.int32)
    TextSegments.longest = max(b - a for a, b in pairwise(batch.cu_seqlens.tolist()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    synchronize(device)
    progress("packs and model", begun)

    seconds = []
    for number in range(UNCOUNTED + steps):
        begun = time.perf_counter()
        for micro_batch in range(settings.global_batch):
            model(**arguments).loss.backward()
            # Waited for while kernels are compiled, so that a run that is cut off says how far it was.
            if number < UNCOUNTED:
                synchronize(device)
                progress(f"step {number}, micro-batch {micro_batch}", begun)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
        progress(f"step {number}", begun)
    median = sorted(seconds[UNCOUNTED:])[steps // 2]

    counts = StepCounts.of([batch] * settings.global_batch, settings.global_batch)
    flops = sum(step_flops(config.model, counts.work, set(settings.trainable), None).values())
    peak = peak_flops(device)
    return {
        "recipe": config.run.name,
        "liger": has_liger,
        "first_seconds": seconds[:UNCOUNTED],
        "step_seconds": median,
        "worst_seconds": max(seconds[UNCOUNTED:]),
        "real_tokens_per_second": counts.tokens / median,
        "mfu": flops / median / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if peak else None,
    }


def main(argv: Sequence[str]) -> None:
    """Time the recipe of the command line and print the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options, words = parser.parse_known_args(argv)
    config = compose(words, 1)
    assert config is not None, "help and --cfg are of launch/pretrain.py"
    text = json.dumps(measure(config, options.steps), indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
