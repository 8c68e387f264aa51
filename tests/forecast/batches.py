"""Packs without content: samples with a picture each, and their shapes."""

import torch

from visionloom.data.stream.batch import PackedBatch
from visionloom.model.flops import StepWork

PATCH_WIDTH = 768


def pictured_pack(
    tokens: int,
    samples: int,
    picture: tuple[int, int] = (8, 12),
    encoder_ranks: int = 1,
    encoder_rank: int = 0,
) -> PackedBatch:
    """A pack that samples of equal length fill, each with one picture of (height, width) patches; dealt in turn.

    A quarter of each sample is supervised. `samples` 0: one sample of text.
    """
    height, width = picture
    visual = height * width // 4
    count = max(1, samples)
    length = tokens // count
    bounds = torch.tensor([*range(0, count * length, length), tokens], dtype=torch.int32)
    starts = bounds[:-1].tolist()
    rows = [torch.arange(start + 4, start + 4 + visual) for start in starts if samples]
    owners = torch.arange(samples, dtype=torch.int32) % encoder_ranks
    mine = int((owners == encoder_rank).sum())
    weights = torch.zeros(tokens)
    for start in starts:
        weights[start + length // 2 : start + length // 2 + length // 4] = 1.0
    return PackedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        labels=torch.zeros(tokens, dtype=torch.int64),
        loss_weights=weights,
        position_ids=torch.zeros(3, tokens, dtype=torch.int32),
        cu_seqlens=bounds,
        max_seqlen=int(bounds.diff().max()),
        patches=torch.zeros(mine * height * width, PATCH_WIDTH, dtype=torch.uint8),
        grid_thw=torch.tensor([[1, height, width]] * samples, dtype=torch.int32).reshape(-1, 3),
        encoder_ranks=owners,
        visual_rows=torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64),
        padding_mask=torch.zeros(tokens, dtype=torch.bool),
        segment_datasets=torch.zeros(count, dtype=torch.int32),
        dataset_names=("test",),
        sample_ids=("sample",) * count,
        supervised_tokens=int((weights > 0).sum()),
        real_tokens=tokens,
        unreadable=torch.zeros(count, dtype=torch.bool),
    )


def work_of(batch: PackedBatch) -> StepWork:
    """The sizes of a pack that count in its operations."""
    frames, height, width = batch.grid_thw.long().T
    return StepWork(
        tokens=batch.real_tokens,
        supervised_tokens=batch.supervised_tokens,
        token_pairs=int((batch.cu_seqlens.long().diff() ** 2).sum()),
        patches=batch.patch_count,
        patch_pairs=int((frames * (height * width) ** 2).sum()),
    )
