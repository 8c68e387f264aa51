"""The training stream: the plan of a phase, turned into PackedBatches step by step."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.cursor import Origin, changes, check_state
from visionloom.data.plan.deal import CostModel, PlannedPack, deal
from visionloom.data.plan.open import dataset_weights, make_plan, open_corpora
from visionloom.data.plan.plan import Plan
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.quarantine import Quarantine
from visionloom.data.stream.reader import Reader


class PackStream:
    """The training data of one phase: a pure function of seed, mixture, lengths and settings.

    Args:
        data: the input of the run.
        phase_name: its order of samples is its own, unless data.continue_draws.
        sequence_length: tokens of a pack.
        global_batch: packs of a step.
        mixture: weight of each dataset; empty: all of data.datasets with their own.
        loss: token, sqrt or sample.
        seed: of all orders.
        cost: work of a pack; it balances ranks only.
        quarantine: file for unreadable samples; None: they are counted only.
        origin: where the draws begin, if not at the beginning.

    Raises:
        UserError: for missing folders, unknown names, and samples longer than a pack, by their dataset's policy.
    """

    def __init__(
        self,
        data: DataConfig,
        phase_name: str,
        sequence_length: int,
        global_batch: int,
        mixture: Mapping[str, float],
        loss: str,
        seed: int,
        cost: CostModel | None = None,
        quarantine: Path | None = None,
        origin: Origin | None = None,
    ) -> None:
        self._arguments = (
            data,
            phase_name,
            sequence_length,
            global_batch,
            dict(mixture),
            loss,
            seed,
            cost,
            quarantine,
        )
        self.data, self.loss, self.phase = data, loss, phase_name
        self.tokenizer = Tokenizer(data.tokenizer)
        self._weights = dataset_weights(data, mixture)
        self.corpora = open_corpora(data, list(self._weights), self.tokenizer)
        self._settings = (phase_name, sequence_length, global_batch, seed, cost or CostModel())
        self.plan = self._make_plan(origin)
        parts = [source.parts for source in self.plan.sources]
        self._reader = Reader(
            self.corpora, parts, data, self.tokenizer, Quarantine(quarantine, data.max_bad_fraction)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._arguments, self.plan.origin, self.plan.known_starts)

    @property
    def dropped(self) -> dict[str, tuple[int, int]]:
        """Of each dataset, the samples that no pack holds, and all tokens that are left out, by its over-length policy."""
        parts = {source.name: source.parts for source in self.plan.sources}
        return {name: (found.dropped, found.lost_tokens) for name, found in parts.items()}

    @property
    def unsupervised(self) -> dict[str, tuple[int, int]]:
        """Of each dataset, the samples that are drawn although nothing in them has a loss, and all of its samples."""
        return {
            source.name: (source.parts.unsupervised, source.size) for source in self.plan.sources
        }

    @property
    def quarantined(self) -> int:
        """Unreadable samples met by this process."""
        return self._reader.quarantine.unreadable

    def watch(self, note: Callable[[str], None]) -> None:
        """Have `note` told of each dataset, shard and sample before it is read."""
        self._reader.note = note

    def report_unreadable(self) -> None:
        """Write the samples that could not be counted to the quarantine; for one process of the run."""
        self._reader.report_unreadable()

    def micro_batches(
        self,
        step: int,
        dp_rank: int,
        dp_size: int,
        micro_batch: int,
        encoder_rank: int = 0,
        encoder_ranks: int = 1,
    ) -> list[PackedBatch]:
        """What one data-parallel rank trains on in a step (from 0 in the phase): its micro-batches of `micro_batch` packs.

        The packs of a step are the same for every dp_size; of their pictures only those of `encoder_rank`, one of
        `encoder_ranks` that share them, are decoded. Raises UserError if the packs cannot be dealt evenly.
        """
        dealt = deal(self.plan.step(step), dp_size, micro_batch)
        return [self._build(packs, step, encoder_rank, encoder_ranks) for packs in dealt[dp_rank]]

    def state(self, step: int) -> dict[str, Any]:
        """Cursor before a step, for the checkpoint: JSON, the same on every rank, whatever the layout; see data/plan/cursor.py."""
        return self.plan.state(step)

    def load_state(self, state: Mapping[str, Any]) -> list[str]:
        """Continue from the cursor of a checkpoint, so that its step is planned without those before it.

        Returns:
            what changed since, where data.on_change=new_phase lets it: from the state's step on the stream is that of a
            new plan, whose draws begin behind those of the old one.

        Raises:
            UserError: naming what changed, if the stream is not the one that the checkpoint was made with.
        """
        state = check_state(state)
        if (origin := Origin.of(state)) != self.plan.origin:
            self.plan = self._make_plan(origin)
        if state["plan_hash"] == self.plan.hash:
            self.plan.jump(int(state["block"]), int(state["first_pack"]))
            return []
        found = changes(state["plan"], self.plan.facts, self.phase)
        if self.data.on_change == "error":
            raise UserError(
                f"the training data is not what the checkpoint was made with: {'; '.join(found)}: restore it, go on with"
                f" data.on_change=new_phase, or set run.name to start a new run"
            )
        self.plan = self._make_plan(Origin.after(state, int(state["step"])))
        return found

    def _make_plan(self, origin: Origin | None) -> Plan:
        return make_plan(self.data, self.corpora, self._weights, *self._settings, origin)

    def _build(
        self, packs: list[PlannedPack], step: int, encoder_rank: int, encoder_ranks: int
    ) -> PackedBatch:
        places, settings = [pack.places for pack in packs], self.plan.settings
        length, multiple = settings.sequence_length, settings.sample_token_multiple
        return self._reader.batch(
            places, length, self.loss, encoder_rank, encoder_ranks, multiple, step
        )


def _restore(arguments: tuple[Any, ...], origin: Origin, starts: dict[int, int]) -> PackStream:
    stream = PackStream(*(*arguments, origin))
    for block, first_pack in starts.items():
        stream.plan.jump(block, first_pack)
    return stream
