"""Samples of one dataset in order, each once, in packs: for losses of held-out samples, and for what a teacher says."""

from visionloom.data.plan.best_fit import PackBudget, pack_samples
from visionloom.data.plan.deal import CostModel, PlannedPack
from visionloom.data.plan.open import StreamOptions
from visionloom.data.plan.plan_blocks import work_of
from visionloom.data.plan.resumable import Rows


def pack_in_order(
    rows: Rows, number: int, options: StreamOptions, multiple: int
) -> list[PlannedPack]:
    """Pack parts, and add packs of padding: as many as make up a multiple.

    Args:
        rows: of dtype PART.
        number: of their dataset.
        options: length and budgets of the packs.
        multiple: every rank must take part in as many steps.
    """
    budget = PackBudget(
        options.sequence_length,
        options.patch_budget,
        options.data.packing_window_samples,
        options.data.sample_token_multiple,
    )
    packs = []
    for numbers in pack_samples(rows["tokens"].tolist(), rows["patches"].tolist(), budget):
        packs.append(_planned_pack(rows[numbers], number))
    lacking = -len(packs) % multiple
    return packs + [PlannedPack((), 0.0)] * lacking


def _planned_pack(rows: Rows, number: int) -> PlannedPack:
    """Return the pack of these parts (dtype PART) of a dataset."""
    samples, part_numbers = rows["sample"].tolist(), rows["part_number"].tolist()
    places = []
    for sample, part_number in zip(samples, part_numbers, strict=True):
        places.append((number, sample, part_number))
    work = work_of(rows["tokens"], rows["patches"], rows["patch_pairs"]).sum(0)
    return PlannedPack(tuple(places), float(CostModel().of(work)))
