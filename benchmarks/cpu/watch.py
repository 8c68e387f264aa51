"""What watching costs of a train step on one CPU core, as a ratio in one run; `make demo` makes the data.

    python benchmarks/cpu/watch.py [--data runs/demo-data] [--steps 40]

Two ways: signs of life of a step times the seconds of one, over the step; and steps with signs beside steps without, in turn, which tells no more than its control does.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from visionloom.common import pulse
from visionloom.common.pulse import Pulse
from visionloom.common.quiet import quiet_libraries
from visionloom.launch.configure import compose
from visionloom.parallel import topology as topologies
from visionloom.tests.train.runs import run_words
from visionloom.train.build import build_model, build_stream, build_trainer, open_topology
from visionloom.train.observe.slow_ranks import SlowRanks, own_seconds
from visionloom.train.step import train_step

PHASE = "multimodal"
CALLS = 100_000


@contextmanager
def without_signs() -> Iterator[None]:
    """Let parts of a step leave no sign."""
    with mock.patch.multiple(Pulse, enter=lambda *_: None, leave=lambda *_: None):
        yield


def seconds_of_a_sign() -> float:
    """Seconds that one sign takes, shown to other processes."""
    alone = Pulse()
    with tempfile.TemporaryDirectory() as folder:
        alone.show(Path(folder) / "board")
        started = time.perf_counter()
        for _ in range(CALLS):
            alone.enter("vision")
            alone.leave()
    return (time.perf_counter() - started) / (2 * CALLS)


def seconds_of_a_look(ranks: int) -> float:
    """Seconds in which the main rank looks for slow ones."""
    slow, each = SlowRanks(), own_seconds({"vision": 1.0})
    started = time.perf_counter()
    for _ in range(100):
        slow.look([each] * ranks, 1.0)
    return (time.perf_counter() - started) / 100


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/demo-data"))
    parser.add_argument("--steps", type=int, default=40, help="steps of each kind")
    options = parser.parse_args()
    quiet_libraries()
    config = compose(run_words(options.data, Path("runs/watch"), 10_000), 1)
    assert config is not None
    topology = open_topology(config)
    stream = build_stream(config, PHASE, Path(config.run.folder), topology)
    parts = build_model(config, topology, drawn=True)
    trainer = build_trainer(config, PHASE, topology, parts, stream)
    batches = stream.micro_batches(0, topology.share, trainer.phase.micro_batch)

    def step() -> float:
        started = time.process_time()
        train_step(trainer, batches)
        return time.process_time() - started

    step()
    with mock.patch.object(Pulse, "_beat", autospec=True, side_effect=Pulse._beat) as beat:
        step()
        signs = beat.call_count
    with_signs, without = [], []
    with tempfile.TemporaryDirectory() as folder:
        pulse.current.show(Path(folder) / "board")
        for turn in range(options.steps):
            # Each kind comes first as often as the other.
            for signs_on in (turn % 2 == 0, turn % 2 == 1):
                if signs_on:
                    with_signs.append(step())
                else:
                    with without_signs():
                        without.append(step())
    seconds, sign = statistics.median(without), seconds_of_a_sign()
    topologies.stop()
    print(
        json.dumps(
            {
                "step_seconds": round(seconds, 4),
                "signs_a_step": signs,
                "microseconds_a_sign": round(sign * 1e6, 2),
                "share_of_a_step_percent": round(100 * signs * sign / seconds, 3),
                "with_signs_over_without": round(statistics.median(with_signs) / seconds, 4),
                # How far two halves of the same kind are apart: what the line above can tell.
                "without_over_without": round(
                    statistics.median(without[::2]) / statistics.median(without[1::2]), 4
                ),
                "look_at_1024_ranks_milliseconds": round(1e3 * seconds_of_a_look(1024), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
