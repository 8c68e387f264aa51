"""The training stream and the held-out sets: plans turned into PackedBatches, ahead of the step that needs them."""

import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from visionloom.data.config import DataConfig
from visionloom.data.encode import EncodedSample
from visionloom.data.mixture import key_of, permutation
from visionloom.data.pack import PackedBatch, encode, pack
from visionloom.data.packing import pack_samples
from visionloom.data.plan import CostModel, Pack, Plan, Settings, Source, deal
from visionloom.data.quarantine import Quarantine
from visionloom.data.reader import Corpus, Reader
from visionloom.data.sample import SampleError
from visionloom.data.tokenizer import Tokenizer
from visionloom.parallel.errors import UserError

STATE_VERSION: Final = 1
PREFETCH: Final = 2
"""Steps built ahead by the background thread or by each worker."""


class PackStream:
    """The training data of one phase: a pure function of seed, mixture, lengths and settings.

    `mixture` maps datasets to weights (empty: all of data.datasets with their own), `loss` is token, sqrt or sample,
    `visual_cost` the time of a patch in units of a text token's (it balances ranks only). Unreadable samples are written
    to `quarantine`. Raises UserError for missing folders, unknown names, and samples longer than a pack.
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
        visual_cost: float = CostModel().patch,
        quarantine: Path | None = None,
    ) -> None:
        self._arguments = (data, phase_name, sequence_length, global_batch, dict(mixture), loss, seed, visual_cost, quarantine)
        self.loss, self.phase = loss, phase_name
        self.tokenizer = Tokenizer(data.tokenizer)
        weights = _weights(data, mixture)
        self.corpora = [Corpus("data.datasets", name, data.datasets[name], data, self.tokenizer) for name in weights]
        budget = int(data.patch_budget * sequence_length)
        settings = Settings(seed, phase_name, sequence_length, global_batch, budget, data.window)
        sources = [self._source(corpus, weights[corpus.name], settings) for corpus in self.corpora]
        self.plan = Plan(sources, settings, CostModel(visual_cost))
        self._reader = Reader(self.corpora, data, self.tokenizer, Quarantine(quarantine))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._arguments, self.plan.known_starts)

    @property
    def dropped(self) -> dict[str, int]:
        """Samples of each dataset that no pack holds, where its policy is to drop them."""
        return {source.name: len(source.lengths) - len(source.kept) for source in self.plan.sources}

    @property
    def quarantined(self) -> int:
        """Unreadable samples met by this process."""
        return self._reader.quarantine.unreadable

    def micro_batches(self, step: int, dp_rank: int, dp_size: int, micro_batch: int) -> list[PackedBatch]:
        """What one data-parallel rank trains on in a step (from 0 in the phase): its micro-batches of `micro_batch` packs.

        The packs of a step are the same for every dp_size. Raises UserError if they cannot be dealt evenly.
        """
        dealt = deal(self.plan.step(step), dp_size, micro_batch)
        return [self._build(packs) for packs in dealt[dp_rank]]

    def state(self, step: int) -> dict[str, Any]:
        """Cursor before a step, for the checkpoint: JSON, the same on every rank, whatever the layout."""
        return {
            "version": STATE_VERSION,
            "plan_hash": self.plan.hash,
            "step": step,
            **self.plan.cursor(step),
            "draws": self.plan.draws_before(step),
            "plan": self.plan.facts,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Accept the cursor of a checkpoint, so that its step is planned without those before it.

        Raises UserError naming what changed if the stream is not the one that the checkpoint was made with.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(f"data state of version {state.get('version')!r}: this program reads version {STATE_VERSION}")
        if state["plan_hash"] != self.plan.hash:
            changes = "; ".join(_changes(state["plan"], self.plan.facts, self.phase))
            raise UserError(
                f"the training data is not what the checkpoint was made with: {changes}: restore it, or start a new run"
            )
        self.plan.jump(int(state["segment"]), int(state["first_pack"]))

    def _source(self, corpus: Corpus, weight: float, settings: Settings) -> Source:
        option = f"phases.{self.phase}.sequence_length"
        kept = corpus.fitting(settings.sequence_length, settings.patch_budget, option)
        return Source(corpus.name, weight, kept, corpus.lengths, corpus.identity)

    def _build(self, packs: list[Pack]) -> PackedBatch:
        samples = iter(self._reader.read([place for pack_ in packs for place in pack_.places]))
        laid_out = [[next(samples) for _ in pack_.places] for pack_ in packs]
        names = [corpus.name for corpus in self.corpora]
        return pack(laid_out, self.plan.settings.sequence_length, self.loss, names, self.tokenizer.pad_id)


def _restore(arguments: tuple[Any, ...], starts: dict[int, int]) -> PackStream:
    stream = PackStream(*arguments)
    for segment, first_pack in starts.items():
        stream.plan.jump(segment, first_pack)
    return stream


def _weights(data: DataConfig, mixture: Mapping[str, float]) -> dict[str, float]:
    for name in mixture:
        if name not in data.datasets:
            raise UserError(f"mixture names {name}, which is not in data.datasets: {', '.join(data.datasets) or 'empty'}")
    weights = dict(mixture) or {name: config.weight for name, config in data.datasets.items()}
    positive = {name: float(weight) for name, weight in weights.items() if weight > 0}
    if not positive:
        raise UserError("no dataset has a weight above 0: name some in data.datasets or in the phase's mixture")
    return positive


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], phase: str) -> list[str]:
    options = {"seed": "run.seed", "patch_budget": "data.patch_budget", "window": "data.window", "phase": "phase"}
    found = [
        f"{options.get(name, f'phases.{phase}.{name}')} was {before.get(name)}, now {value}"
        for name, value in now.items()
        if name != "datasets" and before.get(name) != value
    ]
    for name in sorted({*before["datasets"], *now["datasets"]}):
        old, new = before["datasets"].get(name), now["datasets"].get(name)
        if old is None or new is None:
            found.append(f"dataset {name} was {'added' if old is None else 'removed'}")
            continue
        meaning = {"weight": "weight", "content": "content, tokenizer or pixel limits", "samples": "number of usable samples"}
        found += [
            f"{text} of dataset {name} was {old[key]}, now {new[key]}" for key, text in meaning.items() if old[key] != new[key]
        ]
    return found or ["the order of the datasets changed"]


def iterate(
    stream: PackStream, first_step: int, steps: int, dp_rank: int, dp_size: int, micro_batch: int, workers: int
) -> Generator[list[PackedBatch]]:
    """The micro-batches of `steps` steps from first_step on, built ahead by one thread or by `workers` processes.

    What is read does not depend on `workers`. Errors of building a step are raised where the step would have come.
    """
    ahead = _StepsAhead(stream, first_step, steps, dp_rank, dp_size, micro_batch)
    with closing(_from_processes(ahead, workers) if workers else _from_thread(ahead)) as source:
        for built in source:
            if isinstance(built, Exception):
                raise built
            yield built


class _StepsAhead:
    """The steps of one rank as a map-style dataset; a failing step is its exception."""

    def __init__(self, stream: PackStream, first_step: int, steps: int, dp_rank: int, dp_size: int, micro_batch: int) -> None:
        self.stream, self.first_step, self.steps = stream, first_step, steps
        self.layout = (dp_rank, dp_size, micro_batch)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> list[PackedBatch] | Exception:
        try:
            return self.stream.micro_batches(self.first_step + index, *self.layout)
        except Exception as error:  # handed over, and raised by the reading side with its type kept
            return error


def _unchanged(built: list[PackedBatch] | Exception) -> list[PackedBatch] | Exception:
    return built


def _from_processes(ahead: _StepsAhead, workers: int) -> Generator[list[PackedBatch] | Exception]:
    yield from DataLoader(
        ahead,  # type: ignore[arg-type]  # any object with __len__ and __getitem__ serves
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=_unchanged,
        multiprocessing_context="spawn",  # fork would copy the threads' locks of torch and tokenizers
    )


def _from_thread(ahead: _StepsAhead) -> Generator[list[PackedBatch] | Exception]:
    built: queue.Queue[list[PackedBatch] | Exception] = queue.Queue(PREFETCH)
    stopped = threading.Event()

    def work() -> None:
        for index in range(len(ahead)):
            item = ahead[index]
            while not stopped.is_set():
                try:
                    built.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stopped.is_set():
                return

    thread = threading.Thread(target=work, name="visionloom-data", daemon=True)
    thread.start()
    try:
        for _ in range(len(ahead)):
            yield built.get()
    finally:
        stopped.set()
        thread.join()


class EvaluationSet:
    """Held-out samples of one dataset of data.validation: for the loss as packs, for answers one by one.

    At most `limit` samples, the same ones every time. Raises UserError for an unknown name or a missing folder.
    """

    def __init__(self, data: DataConfig, name: str, limit: int) -> None:
        if name not in data.validation:
            raise UserError(f"data.validation has no dataset {name}: {', '.join(data.validation) or 'it is empty'}")
        self.data, self.name = data, name
        self.tokenizer = Tokenizer(data.tokenizer)
        self.corpus = Corpus("data.validation", name, data.validation[name], data, self.tokenizer)
        self.reader = Reader([self.corpus], data, self.tokenizer, Quarantine())
        self.indices = _spread(len(self.corpus.dataset), limit, name)

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, sequence_length: int, micro_batch: int, loss: str, dp_rank: int, dp_size: int) -> Iterator[PackedBatch]:
        """This rank's share of the samples in packs; every rank gets as many batches, some may hold padding only.

        Raises UserError for samples longer than the pack, unless the dataset's policy is to drop them.
        """
        budget = int(self.data.patch_budget * sequence_length)
        kept = np.intersect1d(self.indices, self.corpus.fitting(sequence_length, budget, "the sequence length"))
        rows = self.corpus.lengths[kept]
        packed = pack_samples(rows["tokens"].tolist(), rows["patches"].tolist(), sequence_length, budget, self.data.window)
        packs = [
            Pack((0,) * len(found), tuple(kept[found].tolist()), float(CostModel().of(rows[found]).sum())) for found in packed
        ]
        packs += [Pack((), (), 0.0)] * (-len(packs) % (dp_size * micro_batch))
        for micro in deal(packs, dp_size, micro_batch)[dp_rank]:
            samples = [self.reader.read(pack_.places) for pack_ in micro]
            yield pack(samples, sequence_length, loss, [self.name], self.tokenizer.pad_id)

    def questions(self, dp_rank: int = 0, dp_size: int = 1) -> Iterator[EncodedSample]:
        """This rank's share of the samples that have an answer, with their patches; unreadable ones are left out.

        `prompt_of` cuts one at its answer, `extend` continues it with generated tokens, `pack_prompts` makes the batch.
        """
        for index in self.indices[dp_rank::dp_size].tolist():
            try:
                sample = encode(self.corpus.dataset.sample(index), self.tokenizer, self.data.media, self.name)
                if sample.answer is not None:
                    yield self.reader.decoded((0, index), sample)
            except SampleError:
                continue


def _spread(size: int, limit: int, name: str) -> NDArray[np.int64]:
    """At most `limit` indices, chosen by the name alone, in order."""
    places = np.arange(min(size, limit))
    return np.sort(permutation(places, size, np.full(len(places), key_of(0, f"evaluation {name}"))))
