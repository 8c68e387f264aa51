"""The training stream and the held-out sets: plans turned into PackedBatches, ahead of the step that needs them."""

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, get_worker_info

from visionloom.common.errors import MachineError, UserError
from visionloom.data.balance import CostModel, Pack, deal
from visionloom.data.config import DataConfig
from visionloom.data.corpus import Corpus
from visionloom.data.encode import EncodedSample
from visionloom.data.mixture import key_of, permutation
from visionloom.data.pack import PackedBatch, encode
from visionloom.data.packing import pack_samples
from visionloom.data.plan import Plan, work_of
from visionloom.data.planning import dataset_weights, make_plan, open_corpora
from visionloom.data.quarantine import Quarantine
from visionloom.data.reader import Reader
from visionloom.data.sample import SampleError
from visionloom.data.state import Origin, changes, check_state
from visionloom.data.tokenizer import Tokenizer
from visionloom.data.views import Rows

PREFETCH: Final = 2
"""Steps built ahead by the background thread or by each worker."""
_UNTIL_REAPED: Final = 0.5
"""Seconds after which the system no longer lists a process that ended."""


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
        self._arguments = (data, phase_name, sequence_length, global_batch, dict(mixture), loss, seed, cost, quarantine)
        self.data, self.loss, self.phase = data, loss, phase_name
        self.tokenizer = Tokenizer(data.tokenizer)
        self._weights = dataset_weights(data, mixture)
        self.corpora = open_corpora(data, list(self._weights), self.tokenizer)
        self._settings = (phase_name, sequence_length, global_batch, seed, cost or CostModel())
        self.plan = self._make_plan(origin)
        views = [source.views for source in self.plan.sources]
        self._reader = Reader(self.corpora, views, data, self.tokenizer, Quarantine(quarantine, data.max_bad_fraction))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self._arguments, self.plan.origin, self.plan.known_starts)

    @property
    def dropped(self) -> dict[str, tuple[int, int]]:
        """Of each dataset, the samples that no pack holds, and all tokens that are left out, by its over-length policy."""
        views = {source.name: source.views for source in self.plan.sources}
        return {name: (found.dropped, found.lost_tokens) for name, found in views.items()}

    @property
    def unsupervised(self) -> dict[str, tuple[int, int]]:
        """Of each dataset, the samples that are drawn although nothing in them has a loss, and all of its samples."""
        return {source.name: (source.views.unsupervised, source.size) for source in self.plan.sources}

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
        self, step: int, dp_rank: int, dp_size: int, micro_batch: int, encoder_rank: int = 0, encoder_ranks: int = 1
    ) -> list[PackedBatch]:
        """What one data-parallel rank trains on in a step (from 0 in the phase): its micro-batches of `micro_batch` packs.

        The packs of a step are the same for every dp_size; of their pictures only those of `encoder_rank`, one of
        `encoder_ranks` that share them, are decoded. Raises UserError if the packs cannot be dealt evenly.
        """
        dealt = deal(self.plan.step(step), dp_size, micro_batch)
        return [self._build(packs, step, encoder_rank, encoder_ranks) for packs in dealt[dp_rank]]

    def state(self, step: int) -> dict[str, Any]:
        """Cursor before a step, for the checkpoint: JSON, the same on every rank, whatever the layout; see data/state.py."""
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
            self.plan.jump(int(state["segment"]), int(state["first_pack"]))
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

    def _build(self, packs: list[Pack], step: int, encoder_rank: int, encoder_ranks: int) -> PackedBatch:
        places, settings = [pack.places for pack in packs], self.plan.settings
        length, multiple = settings.sequence_length, settings.sample_token_multiple
        return self._reader.batch(places, length, self.loss, encoder_rank, encoder_ranks, multiple, step)


def _restore(arguments: tuple[Any, ...], origin: Origin, starts: dict[int, int]) -> PackStream:
    stream = PackStream(*(*arguments, origin))
    for segment, first_pack in starts.items():
        stream.plan.jump(segment, first_pack)
    return stream


def iterate(
    stream: PackStream,
    first_step: int,
    steps: int,
    dp_rank: int,
    dp_size: int,
    micro_batch: int,
    workers: int,
    encoder_rank: int = 0,
    encoder_ranks: int = 1,
) -> Generator[list[PackedBatch]]:
    """The micro-batches of `steps` steps from first_step on, built ahead by one thread or by `workers` processes.

    What is read does not depend on `workers`. Errors of building a step are raised where the step would have come.
    """
    ahead = _StepsAhead(stream, first_step, steps, (dp_rank, dp_size, micro_batch, encoder_rank, encoder_ranks))
    with closing(_from_processes(ahead, workers) if workers else _from_thread(ahead)) as source:
        for built in source:
            if isinstance(built, Exception):
                raise built
            yield built


class _StepsAhead:
    """The steps of one rank as a map-style dataset; a failing step is its exception."""

    def __init__(self, stream: PackStream, first_step: int, steps: int, layout: tuple[int, int, int, int, int]) -> None:
        self.stream, self.first_step, self.steps, self.layout = stream, first_step, steps, layout
        self.boards = _Boards(0)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> list[PackedBatch] | Exception:
        step = self.first_step + index
        place = f"step {step}"

        def note(found: str) -> None:
            nonlocal place
            place = f"step {step}, {found}"
            self.boards.write(place)

        self.stream.watch(note)
        try:
            return self.stream.micro_batches(step, *self.layout)
        except Exception as error:  # handed over, and raised by the reading side with its type kept
            info = get_worker_info()
            error.add_note(f"in data worker {info.id} at {place}" if info else f"while reading ahead, at {place}")
            return error


class _Boards:
    """What each worker is at, in memory that all processes share: it outlives a worker that is killed."""

    SIZE: Final = 400
    """Bytes of a worker's line."""

    def __init__(self, workers: int) -> None:
        self.lines = [_forking().RawArray("c", self.SIZE) for _ in range(workers)]

    def write(self, line: str) -> None:
        """Note what this worker is at; does nothing in a process that is none."""
        if (info := get_worker_info()) is not None:
            self.lines[info.id].value = f"{os.getpid()} {line}".encode()[: self.SIZE - 1]

    def dead(self) -> str:
        """The first worker that is gone, and what it was at; empty if all are there."""
        for worker, line in enumerate(self.lines):
            process, _, place = line.value.decode(errors="replace").partition(" ")
            if process and not _is_alive(int(process)):
                return f"data worker {worker} (process {process}) died at {place}"
        return ""


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _unchanged(built: list[PackedBatch] | Exception) -> list[PackedBatch] | Exception:
    return built


def _from_processes(ahead: _StepsAhead, workers: int) -> Generator[list[PackedBatch] | Exception]:
    ahead.boards = _Boards(workers)
    loader: DataLoader[list[PackedBatch] | Exception] = DataLoader(
        ahead,  # type: ignore[arg-type]  # any object with __len__ and __getitem__ serves
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=_unchanged,
        multiprocessing_context=_forking(),
        worker_init_fn=_end_with_parent,
    )
    try:
        yield from loader
    except (RuntimeError, OSError, EOFError) as error:  # torch's own word, or a pipe that nobody holds any more
        time.sleep(_UNTIL_REAPED)
        if not (
            found := ahead.boards.dead()
            or ("exited unexpectedly" in str(error) and "a data worker died before its first sample")
        ):
            raise
        raise MachineError(
            f"{found}: killed from outside, most likely for want of memory (see dmesg): give it fewer data.workers or smaller"
            " data.store.bytes_in_flight, or leave that shard out; the same command goes on from the last checkpoint"
        ) from None


def _forking() -> ForkServerContext:
    """Workers are forked from a process that has imported this file and has no threads: they share what is imported.

    Forking this process would copy the locks of its threads, spawning would import torch anew for each (0.2 GiB).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _end_with_parent(_: int) -> None:
    """End this worker when the process that reads from it was killed.

    torch's own watch is over the process that forked the worker, which lives on as long as a worker does.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="visionloom-parent", daemon=True).start()


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
        self.indices = _spread(len(self.corpus.dataset), limit, name)

    def __len__(self) -> int:
        return len(self.indices)

    def batches(
        self,
        sequence_length: int,
        micro_batch: int,
        loss: str,
        dp_rank: int,
        dp_size: int,
        encoder_rank: int = 0,
        encoder_ranks: int = 1,
    ) -> Iterator[PackedBatch]:
        """This rank's share of the samples in packs; every rank gets as many batches, some may hold padding only.

        The pictures are dealt as in PackStream.micro_batches. Raises UserError for samples longer than the pack, unless the
        dataset's policy is to drop them.
        """
        multiple, budget = self.data.sample_token_multiple, int(self.data.max_patches_per_token * sequence_length)
        views = self.corpus.views(sequence_length // multiple * multiple, budget, "the sequence length")
        reader = Reader([self.corpus], [views], self.data, self.tokenizer, Quarantine())
        rows, _ = views.of(self.indices)
        tokens = -(-rows["tokens"].astype(np.int64) // multiple) * multiple
        packed = pack_samples(
            tokens.tolist(), rows["patches"].tolist(), sequence_length, budget, self.data.packing_window_samples
        )
        for micro in deal(self._packs(rows, packed, dp_size * micro_batch), dp_size, micro_batch)[dp_rank]:
            places = [pack_.places for pack_ in micro]
            yield reader.batch(places, sequence_length, loss, encoder_rank, encoder_ranks, multiple)

    def _packs(self, rows: Rows, packed: list[list[int]], multiple: int) -> list[Pack]:
        """Packs of the dataset's views, with empty ones up to a multiple."""
        packs = []
        for numbers in packed:
            found = rows[numbers]
            places = tuple(
                (0, sample, part) for sample, part in zip(*(found[f].tolist() for f in ("sample", "part")), strict=True)
            )
            packs.append(Pack(places, float(CostModel().of(work_of(found, np.array([0, len(found)])))[0])))
        return packs + [Pack((), 0.0)] * (-len(packs) % multiple)

    def questions(self, dp_rank: int = 0, dp_size: int = 1) -> Iterator[EncodedSample]:
        """This rank's share of the samples that have an answer, with their patches; unreadable ones are left out.

        `prompt_of` cuts one at its answer, `extend` continues it with generated tokens, `pack_prompts` makes the batch.
        """
        reader = Reader([self.corpus], [], self.data, self.tokenizer, Quarantine())
        for index in self.indices[dp_rank::dp_size].tolist():
            try:
                sample = encode(self.corpus.dataset.sample(index), self.tokenizer, self.data.media, self.name)
                if sample.answer is not None:
                    yield reader.decoded((0, index, 0), sample)
            except SampleError:
                continue


def _spread(size: int, limit: int, name: str) -> NDArray[np.int64]:
    """At most `limit` indices, chosen by the name alone, in order."""
    places = np.arange(min(size, limit))
    return np.sort(permutation(places, size, np.full(len(places), key_of(0, f"evaluation {name}"))))
