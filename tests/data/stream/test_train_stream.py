"""The stream end to end, from shards on disk: exactly once, the same for every layout, worker count and restart."""

import json
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig
from visionloom.data.encode.encode import extend, prompt_of
from visionloom.data.plan.open import StreamOptions
from visionloom.data.stream import quarantine
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.held_out import EvaluationSet
from visionloom.data.stream.train_stream import PackStream
from visionloom.data.stream.workers import chosen_workers, iterate
from visionloom.parallel.share import ALONE, Share
from visionloom.tests.data.batches import digest
from visionloom.tests.data.samples import essay, film, picture_question

LENGTH = 256


@pytest.fixture
def data(config: Callable[..., DataConfig]) -> DataConfig:
    return config(
        pictures=[
            picture_question(number, (32, 32 * (1 + number % 3)), number % 7)
            for number in range(90)
        ],
        films=[film(number, 2 + number % 4) for number in range(20)],
        texts=[essay(number, number % 40) for number in range(50)],
    )


def stream(data: DataConfig, **changes: object) -> PackStream:
    values: dict[str, object] = {
        "phase_name": "p",
        "sequence_length": LENGTH,
        "global_batch": 6,
        "mixture": {"pictures": 4, "films": 1, "texts": 1},
        "loss": "sqrt",
        "seed": 7,
    }
    quarantine = changes.pop("quarantine", None)
    options = StreamOptions(data, **{**values, **changes})  # type: ignore[arg-type]
    return PackStream(options, quarantine)  # type: ignore[arg-type]


def packs_of(batch: PackedBatch) -> list[tuple[str, ...]]:
    """Sample ids of each pack."""
    ids, packs = iter(batch.sample_ids), list[tuple[str, ...]]()
    starts = batch.cu_seqlens[:-1].numpy() // LENGTH
    for number in range(len(batch.input_ids) // LENGTH):
        packs.append(
            tuple(
                next(ids)
                for source in batch.segment_datasets[starts == number].tolist()
                if source >= 0
            )
        )
    return packs


def test_a_step_holds_the_same_packs_for_every_layout(data: DataConfig) -> None:
    made = stream(data)
    for step in (0, 5):
        whole = sorted(
            pack for batch in made.micro_batches(step, ALONE, 1) for pack in packs_of(batch)
        )
        assert len(whole) == 6
        for ranks, micro_batch in ((1, 6), (2, 1), (2, 3), (3, 2)):
            dealt = [
                batch
                for rank in range(ranks)
                for batch in made.micro_batches(step, Share(rank, ranks), micro_batch)
            ]
            assert sorted(pack for batch in dealt for pack in packs_of(batch)) == whole
            assert all(len(batch.input_ids) == micro_batch * LENGTH for batch in dealt)
    with pytest.raises(UserError, match="4 data-parallel ranks"):
        made.micro_batches(0, Share(0, 4), 1)


def test_every_sample_once_an_epoch(data: DataConfig) -> None:
    made = stream(data, mixture={"texts": 1}, global_batch=1)
    made.plan.step(0)
    packs = made.plan.known_starts[1]
    counts, spread = Counter({f"essay:{number}": 0 for number in range(50)}), 0
    for step in range(packs):
        counts.update(made.micro_batches(step, ALONE, 1)[0].sample_ids)
        spread = max(spread, max(counts.values()) - min(counts.values()))
    assert len(counts) == 50
    assert counts.total() == made.plan.draws_per_block
    assert (
        max(counts.values()) - min(counts.values()) == 1
    )  # the last epoch of the block goes on in the next
    assert spread <= 8, "packing and shuffling may mix neighbouring epochs only"


def test_the_stream_is_a_function_of_its_settings(data: DataConfig) -> None:
    expected = digest(stream(data).micro_batches(4, Share(1, 2), 3))
    assert digest(stream(data).micro_batches(4, Share(1, 2), 3)) == expected
    assert digest(stream(data, seed=8).micro_batches(4, Share(1, 2), 3)) != expected
    assert digest(stream(data, phase_name="q").micro_batches(4, Share(1, 2), 3)) != expected


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"),
    [(2, "1", 0), (2, "2", 0), (4, "1", 2), (16, "8", 0), (32, "8", 2), (112, "8", 4), (16, "", 4)],
)
def test_workers_are_chosen_by_the_cores_of_a_rank(
    cores: int, ranks: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert chosen_workers(None) == workers
    assert [chosen_workers(given) for given in (0, 1, 7)] == [0, 1, 7]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_change_nothing(data: DataConfig, workers: int) -> None:
    made = stream(data)
    expected = [digest(stream(data).micro_batches(step, Share(1, 2), 1)) for step in range(3, 6)]
    assert [
        digest(batches) for batches in iterate(made, range(3, 6), Share(1, 2), 1, workers)
    ] == expected


READER = """
import pickle, sys
from visionloom.data.stream.workers import iterate
from visionloom.parallel.share import ALONE
if __name__ == "__main__":
    for _ in iterate(pickle.load(open(sys.argv[1], "rb")), range(10_000), ALONE, 6, 2):
        print("ready", flush=True)
"""


def test_workers_end_with_a_killed_reader(data: DataConfig, tmp_path: Path) -> None:
    """Reference: the kernel's list of processes."""
    (tmp_path / "stream").write_bytes(pickle.dumps(stream(data)))
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, str(tmp_path / "reader.py"), str(tmp_path / "stream")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        helpers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(helpers) >= 3
    assert psutil.wait_procs(helpers, timeout=30)[1] == []


def test_errors_come_out_of_the_iterator_with_their_type(data: DataConfig) -> None:
    with pytest.raises(UserError, match="cannot be dealt to 5"):
        next(iterate(stream(data), range(2), Share(0, 5), 1, workers=0))


@pytest.mark.parametrize(
    ("workers", "where"), [(0, "while reading ahead, at step 0"), (1, "in data worker 0 at step 0")]
)
def test_row_37_errors_say_which_worker_and_what_it_was_at(
    data: DataConfig, workers: int, where: str
) -> None:
    """Row 37 of the fault matrix, second half: also of errors that nobody foresaw."""
    with pytest.raises(UserError) as caught:
        next(iterate(stream(data), range(2), Share(0, 5), 1, workers=workers))
    assert caught.value.__notes__ == [where]


def test_an_iterator_can_be_left_early(data: DataConfig) -> None:
    steps = iterate(stream(data), range(1000), ALONE, 6, workers=0)
    next(steps)
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)


def test_a_restart_continues_where_the_state_says(data: DataConfig) -> None:
    made = stream(data)
    seen = Counter[str]()
    for step in range(70):
        seen.update(
            name.split(":")[0]
            for batch in made.micro_batches(step, ALONE, 6)
            for name in batch.sample_ids
        )
    text = json.dumps(made.state(70))
    assert len(text) <= 4096
    state = json.loads(text)
    for name, kind in (("pictures", "picture"), ("films", "film"), ("texts", "essay")):
        assert seen[kind] <= state["draws"][name] <= seen[kind] + 300
    resumed = stream(data)
    resumed.load_state(state)
    assert digest(resumed.micro_batches(70, Share(0, 3), 2)) == digest(
        made.micro_batches(70, Share(0, 3), 2)
    )
    assert resumed.state(70) == state


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 8}, "run.seed was 7, now 8"),
        ({"sequence_length": 300}, "phases.p.sequence_length was 256, now 300"),
        ({"global_batch": 4}, "phases.p.global_batch was 6, now 4"),
        ({"mixture": {"pictures": 4, "films": 1}}, "dataset texts was removed"),
        (
            {"mixture": {"pictures": 4, "films": 2, "texts": 1}},
            "weight of dataset films was 1.0, now 2.0",
        ),
    ],
)
def test_a_state_of_another_stream_is_refused(
    data: DataConfig, changes: dict[str, object], named: str
) -> None:
    state = stream(data).state(2)
    with pytest.raises(UserError, match=named):
        stream(data, **changes).load_state(state)
    with pytest.raises(UserError, match="version 99"):
        stream(data).load_state({**state, "version": 99})


def test_changed_pixel_limits_are_named(data: DataConfig) -> None:
    state = stream(data).state(2)
    data.media.image_min_pixels = 4096
    with pytest.raises(UserError, match=r"data\.media or data\.chat_format was \w{8}, now \w{8}"):
        stream(data).load_state(state)


def test_a_changed_format_of_chats_is_named(data: DataConfig) -> None:
    state = stream(data).state(2)
    data.chat_format = "thinking"
    with pytest.raises(UserError, match=r"data\.media or data\.chat_format was \w{8}, now \w{8}"):
        stream(data).load_state(state)


def test_budgets_hold(data: DataConfig) -> None:
    data.max_patches_per_token = 0.2
    made = stream(data, mixture={"pictures": 1})
    batches = [batch for step in range(12) for batch in made.micro_batches(step, ALONE, 1)]
    counts = [len(batch.patches) for batch in batches]
    assert max(counts) <= int(0.2 * LENGTH)
    assert max(counts) >= 0.2 * LENGTH - 8, "the patch budget must bind in this test"


def test_unknown_names_are_refused(data: DataConfig) -> None:
    with pytest.raises(UserError, match=r"mixture names photos, which is not in data\.datasets"):
        stream(data, mixture={"photos": 1})
    with pytest.raises(UserError, match="no dataset has a weight above 0"):
        stream(data, mixture={"films": 0})
    with pytest.raises(UserError, match=r"data\.validation has no dataset photos"):
        EvaluationSet(data, "photos", 10)


def break_member(data: DataConfig, name: str, number: int) -> None:
    """Overwrite a stored picture of a shard without changing its size."""
    path = Path(data.datasets[name].path) / f"{name}-000000.tar"
    content = bytearray(path.read_bytes())
    place = -1
    for _ in range(number + 1):
        place = content.index(b"\x89PNG", place + 1)
    content[place + 40 : place + 60] = bytes(20)
    path.write_bytes(content)


def test_an_unreadable_picture_is_masked_and_written_down(data: DataConfig, tmp_path: Path) -> None:
    step, bad = 1, 3
    before = stream(data, mixture={"pictures": 1}).micro_batches(step, ALONE, 6)[0]
    bad = int(
        next(name for name in before.sample_ids if int(name.split(":")[1]) < 40).split(":")[1]
    )
    break_member(data, "pictures", bad)
    file = tmp_path / "run" / "quarantine.jsonl"
    made = stream(data, mixture={"pictures": 1}, quarantine=file)
    after = made.micro_batches(step, ALONE, 6)[0]
    assert after.sample_ids == before.sample_ids
    for name in (
        "input_ids",
        "position_ids",
        "cu_seqlens",
        "grid_thw",
        "visual_rows",
        "padding_mask",
    ):
        assert torch.equal(getattr(after, name), getattr(before, name))
    sick = [index for index, name in enumerate(after.sample_ids) if name == f"picture:{bad}"]
    places = torch.zeros(len(after.input_ids), dtype=torch.bool)
    real = torch.nonzero(after.segment_datasets >= 0).flatten()[sick]
    for segment in real.tolist():
        places[after.cu_seqlens[segment] : after.cu_seqlens[segment + 1]] = True
    assert (after.labels[places] == -100).all()
    assert not after.loss_weights[places].any()
    assert torch.equal(after.labels[~places], before.labels[~places])
    assert torch.equal(after.loss_weights[~places], before.loss_weights[~places])
    changed = (after.patches != before.patches).any(1)
    assert changed.any()
    assert not after.patches[changed].any()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 1
    assert records[0]["dataset"] == "pictures"
    assert records[0]["shard"] == "pictures-000000.tar"
    assert records[0]["member"] == "a.png"
    assert {"key", "offset", "error", "sample"} <= set(records[0])
    assert made.quarantined == len(sick)


def test_too_many_unreadable_samples_stop_the_run(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "MIN_SAMPLES", 50)
    for number in range(30):
        break_member(data, "pictures", number)
    made = stream(data, mixture={"pictures": 1})
    with pytest.raises(
        RuntimeError,
        match=r"samples could not be read \(more than data\.max_bad_fraction = 0\.001\).*dataset pictures",
    ):
        list(iterate(made, range(10), ALONE, 6, workers=0))


def test_held_out_samples_are_dealt_once(data: DataConfig) -> None:
    held_out = EvaluationSet(data, "pictures", limit=70)
    assert len(held_out) == 70
    expected = sorted(f"picture:{index}" for index in held_out.indices)
    for ranks, micro_batch in ((1, 2), (3, 1)):
        dealt = [
            list(held_out.batches(LENGTH, micro_batch, "sqrt", Share(rank, ranks)))
            for rank in range(ranks)
        ]
        assert len({len(batches) for batches in dealt}) == 1, (
            "every rank needs as many forward passes"
        )
        assert (
            sorted(name for batches in dealt for batch in batches for name in batch.sample_ids)
            == expected
        )
    again = EvaluationSet(data, "pictures", limit=70)
    assert again.indices.tolist() == held_out.indices.tolist()
    assert len(EvaluationSet(data, "pictures", limit=1000)) == 90
    with pytest.raises(UserError, match=r"data\.validation\.pictures\.over_length=drop"):
        next(held_out.batches(20, 1, "sqrt", ALONE))


def test_questions_are_prompts_with_pixels(data: DataConfig) -> None:
    held_out = EvaluationSet(data, "pictures", limit=9)
    questions = [list(held_out.questions(Share(rank, 2))) for rank in range(2)]
    assert len(questions[0]) + len(questions[1]) == 9
    question = questions[0][0]
    assert question.answer is not None
    assert question.answer.startswith("It is number ")
    prompt = prompt_of(question)
    assert held_out.tokenizer.decode(prompt.input_ids.tolist(), keep_special=True).endswith(
        "<|im_start|>assistant\n"
    )
    assert prompt.patches is not None
    assert len(prompt.patches) == prompt.patch_count > 0
    told = extend(prompt, held_out.tokenizer.encode([question.answer])[0].tolist())
    assert np.array_equal(told.input_ids, question.input_ids[: len(told.input_ids)])
    assert not list(EvaluationSet(data, "texts", limit=9).questions())


KILLED = """
import pickle, sys
from visionloom.common.errors import MachineError
from visionloom.data.stream.workers import iterate
from visionloom.parallel.share import ALONE

if __name__ == "__main__":
    try:
        for _ in iterate(pickle.load(open(sys.argv[1], "rb")), range(10_000), ALONE, 6, 2):
            print("ready", flush=True)
    except MachineError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
"""


@pytest.mark.faults
def test_row_37_a_killed_worker_is_named_with_its_shard_and_nothing_hangs(
    data: DataConfig, tmp_path: Path
) -> None:
    """Row 37 of the fault matrix: kill -9 of a worker ends the run with one line that says what it was at."""
    (tmp_path / "stream").write_bytes(pickle.dumps(stream(data)))
    (tmp_path / "reader.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "reader.py"), str(tmp_path / "stream")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        helpers = psutil.Process(process.pid).children(recursive=True)
        worker = next(one for one in helpers if any(other.pid == one.ppid() for other in helpers))
        worker.kill()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(
        rf"data worker [01] \(process {worker.pid}\) died at step \d+, dataset \w+, shard \w+-\d+\.tar, sample \d+( and \d+ more)?:"
        r" killed from outside.*the same command goes on from the last checkpoint\n",
        said,
    ), said
