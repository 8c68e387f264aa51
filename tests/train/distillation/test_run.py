"""A student learns from a teacher that runs beside it and from one that was stored, in real runs on the demo's data.

References: the same run with the other kind of teacher; one process; the same run without an interruption.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from visionloom.common.errors import UserError
from visionloom.data.stream.teacher_store import ENTRY, INDEX, KEY, StoredRows, TeacherStore
from visionloom.data.stream.teacher_write import StoreWriter
from visionloom.launch.configure import check_agreements
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config
from visionloom.train.config import RunConfig
from visionloom.train.distillation.options import StoreOptions
from visionloom.train.distillation.store_pass import store_teacher
from visionloom.train.run import pretrain

VOCABULARY = 512
SMALL = (
    "phases.multimodal.mixture={captions: 0, text: 0, vqa: 0, grounding: 0}",
    "checkpoint.every_steps=2",
)
WORDS = ("phases.multimodal.global_batch=2", "phases.multimodal.warmup_steps=0", *SMALL)
HERE = "phases.multimodal.distillation"
LAYOUTS: dict[str, list[str]] = {
    "tensor 2": ["parallel.tensor=2"],
    "context 2": ["parallel.context=2", "data.sample_token_multiple=4"],
    "data 2": [],
    "pipeline 2, virtual 2": ["parallel.pipeline=2", "parallel.virtual_pipeline=2"],
}
LIVE = f"{HERE}.teacher.checkpoint=a"
Rows = dict[bytes, StoredRows]


def train(config: RunConfig) -> None:
    pretrain(config)


def store(config: RunConfig, options: StoreOptions) -> None:
    store_teacher(config, options)


class Workshop:
    """A teacher of a few steps, and stores of what it says."""

    def __init__(self, pool: RankPool, data: Path, folder: Path) -> None:
        self.pool, self.data, self.folder = pool, data, folder
        pool.run(1, train, self.config("teacher", 2))
        self.checkpoint = folder / "teacher/checkpoints/multimodal/step-00000002"

    def config(self, name: str, steps: int, *more: str, ranks: int = 1) -> RunConfig:
        return run_config(self.data, self.folder / name, steps, ranks, *WORDS, *more)

    def store(self, name: str, *more: str, ranks: int = 1, kept: int = 8) -> Path:
        out = self.folder / name
        options = StoreOptions(str(out), "multimodal", str(self.checkpoint), kept, dtype="fp32")
        # As many packs as the stages or the data ranks of any layout deal with; none is trained on.
        packs = "phases.multimodal.global_batch=4"
        config = self.config(f"{name}-run", 2, packs, *more, ranks=ranks)
        self.pool.run(ranks, store, config, options)
        return out

    def losses(self, name: str, steps: int, *more: str, ranks: int = 1) -> list[float]:
        """Both losses of each step of a student, one after the other."""
        config = self.config(name, steps, "run.seed=5", *more, ranks=ranks)
        check_agreements(config)
        self.pool.run(ranks, train, config)
        found = []
        for line in metrics(self.folder / name):
            found += [line["loss"], line["distillation_loss"]]
        return found


@pytest.fixture(scope="module")
def workshop(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(pool, demo_data, tmp_path_factory.mktemp("distillation"))


@pytest.fixture(scope="module")
def whole(workshop: Workshop) -> Path:
    """A store of the whole vocabulary, in fp32."""
    return workshop.store("whole", kept=VOCABULARY)


@pytest.fixture(scope="module")
def live(workshop: Workshop) -> list[float]:
    return workshop.losses("live", 3, f"{HERE}.teacher.checkpoint={workshop.checkpoint}")


def rows_of(folder: Path) -> Rows:
    """What a store says of each sample, by its key."""
    store = TeacherStore(folder, "stored")
    found = {}
    for key, entry in zip(store._keys, store._entries, strict=True):
        rows = store.read(entry)
        assert rows is not None
        found[bytes(key)] = rows
    return found


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, []),
        (2, ["parallel.tensor=2"]),
        pytest.param(2, LAYOUTS["context 2"], marks=pytest.mark.long),
    ],
)
def test_a_store_of_all_tokens_is_the_live_teacher(
    ranks: int, layout: list[str], workshop: Workshop, whole: Path, live: list[float]
) -> None:
    """The store was written in another order, by one rank; 2e-8 measured on one rank."""
    name = f"stored-{ranks}-{len(layout)}"
    found = workshop.losses(name, 3, f"{HERE}.stored={whole}", *layout, ranks=ranks)
    if "data.sample_token_multiple=4" not in layout:
        assert found == pytest.approx(live, abs=1e-5)
    assert all(loss > 1e-3 for loss in live)


def test_a_resumed_student_goes_on_as_if_nothing_had_been(
    workshop: Workshop, live: list[float]
) -> None:
    word = f"{HERE}.teacher.checkpoint={workshop.checkpoint}"
    folder = workshop.folder / "resumed"
    shutil.copytree(workshop.folder / "live", folder)
    latest = folder / "checkpoints/multimodal"
    shutil.rmtree(latest / "step-00000003")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    assert workshop.losses("resumed", 3, word) == live


@pytest.mark.parametrize(
    ("layout", "most"),
    [
        ([], 0.0),
        # Its hidden states are those of another layout, equal but for their rounding.
        (["parallel.tensor=2", f"{HERE}.teacher.parallel.pipeline=2"], 1e-6),
    ],
)
def test_a_teacher_teaches_itself_nothing(
    layout: list[str], most: float, workshop: Workshop
) -> None:
    words = (
        f"init.checkpoint={workshop.checkpoint}",
        f"{HERE}.teacher.checkpoint={workshop.checkpoint}",
        f"{HERE}.cross_entropy_weight=0",
        f"{HERE}.temperature=2",
    )
    name, ranks = f"itself-{len(layout)}", 2 if layout else 1
    losses = workshop.losses(name, 1, *words, *layout, ranks=ranks)
    assert abs(losses[1]) <= most
    assert metrics(workshop.folder / name)[0]["grad_norm"] <= most


@pytest.fixture(scope="module")
def cut(workshop: Workshop) -> list[float]:
    """Losses of one process whose samples take up the room that two context ranks need."""
    word = f"{HERE}.teacher.checkpoint={workshop.checkpoint}"
    return workshop.losses("cut", 3, word, "data.sample_token_multiple=4")


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([], "tensor=2"),
        pytest.param(["parallel.pipeline=2"], "context=2", marks=pytest.mark.long),
        pytest.param(["parallel.context=2"], "tensor=1", marks=pytest.mark.long),
    ],
)
def test_a_teacher_may_have_a_layout_of_its_own(
    student: list[str], teacher: str, workshop: Workshop, cut: list[float]
) -> None:
    """Reference: one process. Pictures and videos are dealt to other ranks for the teacher than for the student."""
    words = (
        f"{HERE}.teacher.checkpoint={workshop.checkpoint}",
        f"{HERE}.teacher.parallel.{teacher}",
        "data.sample_token_multiple=4",
        "phases.multimodal.micro_batch=1",
    )
    losses = workshop.losses(f"own-{teacher}", 3, *words, *student, ranks=2)
    assert losses == pytest.approx(cut, abs=1e-5)


@pytest.fixture(scope="module")
def few(workshop: Workshop) -> Rows:
    """Eight tokens of each row, stored by one process."""
    return rows_of(workshop.store("few"))


@pytest.mark.parametrize(
    "layout",
    ["tensor 2", *(pytest.param(n, marks=pytest.mark.long) for n in list(LAYOUTS)[1:])],
)
def test_a_store_does_not_depend_on_the_teacher_s_layout(
    layout: str, workshop: Workshop, few: Rows
) -> None:
    found = rows_of(workshop.store(f"few {layout}", *LAYOUTS[layout], ranks=2))
    assert found.keys() == few.keys()
    assert len(few) > 100
    for key, rows in few.items():
        near = {"rtol": 0, "atol": 2e-5}
        np.testing.assert_allclose(found[key].log_probabilities, rows.log_probabilities, **near)
        np.testing.assert_allclose(found[key].log_rest, rows.log_rest, **near)
        # Of equal probabilities either may come first.
        assert np.mean(found[key].ids == rows.ids) > 0.98


def stopped(config: RunConfig, options: StoreOptions) -> None:
    """A pass that ends after its first unit. Runs on a rank of the pool."""
    done = StoreWriter.mark_done

    def mark(writer: StoreWriter, unit: object, copies: int) -> None:
        if len(list(writer.staging.glob("*-*.json"))) == 1:
            raise KeyboardInterrupt
        done(writer, unit, copies)  # type: ignore[arg-type]

    with patch.object(StoreWriter, "mark_done", mark), pytest.raises(KeyboardInterrupt):
        store_teacher(config, options)


def test_an_interrupted_pass_goes_on(workshop: Workshop, few: Rows) -> None:
    out = workshop.folder / "interrupted"
    options = StoreOptions(str(out), "multimodal", str(workshop.checkpoint), 8, dtype="fp32")
    workshop.pool.run(1, stopped, workshop.config("interrupted-run", 2), options)
    with pytest.raises(UserError, match="holds no complete store"):
        TeacherStore(out, "stored")
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    other = replace(options, temperature=2.0)
    with pytest.raises(AssertionError, match="use the same words again"):
        workshop.pool.run(1, store, workshop.config("interrupted-run", 2), other)

    workshop.pool.run(1, store, workshop.config("interrupted-run", 2), options)
    for name in sorted(written)[:1]:
        assert (out / name).stat().st_mtime_ns == written[name]
    found = rows_of(out)
    assert found.keys() == few.keys()
    assert all(np.array_equal(found[key].ids, few[key].ids) for key in few)


# ---- what a user may get wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{HERE}.weight=2"], "has no teacher: set one of"),
        (
            [f"{HERE}.stored=a", f"{HERE}.teacher.huggingface=b"],
            "are set: a phase has one teacher",
        ),
        ([f"{HERE}.direction=both"], "direction=both"),
        (
            [f"{HERE}.stored=a", f"{HERE}.teacher.parallel.tensor=2"],
            "teacher.parallel is the layout of a live teacher, and .*stored is set",
        ),
        (
            [LIVE, f"{HERE}.teacher.parallel.tensor=3"],
            r"4 ranks cannot hold tensor 3 .* or change phases.multimodal.distillation.teacher.parallel",
        ),
        (
            [LIVE, f"{HERE}.teacher.parallel.tensor=2", "parallel.tensor=4"],
            "makes 2 copies of the teacher, to which the 1 micro-batches of a step",
        ),
        (
            [LIVE, f"{HERE}.teacher.parallel.context=4", "phases.multimodal.sequence_length=260"],
            r"teacher.parallel needs packs \(sequence_length=260\) of a multiple of 8 tokens",
        ),
        (
            [LIVE, f"{HERE}.teacher.parallel={{context: 4}}"],
            "sample_token_multiple=1 must be a multiple of 8: .*teacher.parallel.context=4",
        ),
    ],
)
def test_options_that_cannot_be(words: list[str], message: str, workshop: Workshop) -> None:
    with pytest.raises(UserError, match=message):
        workshop.config("refused", 2, *words, ranks=4)


def test_a_layout_that_does_not_divide_the_teacher_is_refused(workshop: Workshop) -> None:
    """The student has a layout of four ranks that its teacher, with two key/value heads, could not have."""
    words = (
        f"{HERE}.teacher.checkpoint={workshop.checkpoint}",
        f"{HERE}.teacher.parallel.tensor=4",
        "model.text.kv_heads=4",
        "parallel.tensor=4",
    )
    config = workshop.config("refused", 2, *words, ranks=4)
    with pytest.raises(UserError, match=r"teacher.parallel.tensor=4 does not divide .*kv_heads=2"):
        check_agreements(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{HERE}.temperature=2"], "temperature=2, but .*stored was stored at 1: set it alike"),
        (["model.text.vocab_size=640"], "has a vocabulary of 512 rows, but .*vocab_size=640"),
    ],
)
def test_a_store_that_does_not_fit_is_refused_before_the_run(
    words: list[str], message: str, workshop: Workshop, whole: Path
) -> None:
    config = workshop.config("refused", 2, f"{HERE}.stored={whole}", *words)
    with pytest.raises(UserError, match=message):
        check_agreements(config)


def test_a_live_teacher_with_another_vocabulary_is_refused(workshop: Workshop) -> None:
    word = f"{HERE}.teacher.checkpoint={workshop.checkpoint}"
    config = workshop.config("refused", 2, word, "model.text.vocab_size=640")
    with pytest.raises(UserError, match="a student learns from a teacher with its own tokenizer"):
        check_agreements(config)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "is not in it: all datasets"),
        pytest.param("changed", "is in it in another form", marks=pytest.mark.long),
        ("bytes", "bytes have changed"),
    ],
)
def test_a_sample_that_the_store_does_not_know_is_refused(
    damage: str, message: str, workshop: Workshop, few: Rows
) -> None:
    folder = workshop.folder / damage
    shutil.copytree(workshop.folder / "few", folder)
    content = (folder / INDEX).read_bytes()
    keys = np.frombuffer(content, KEY, len(few)).copy()
    entries = np.frombuffer(content, ENTRY, offset=keys.nbytes).copy()
    if damage == "missing":
        keys, entries = keys[:1], entries[:1]
    elif damage == "changed":
        entries["content"] = b"another"
    else:
        entries["crc32"] += 1
    (folder / INDEX).write_bytes(keys.tobytes() + entries.tobytes())
    with pytest.raises(AssertionError, match=message):
        workshop.losses(f"{damage}-run", 2, f"{HERE}.stored={folder}")
