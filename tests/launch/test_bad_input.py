"""What a user can do wrong: each mistake ends in one clear line behind `error:`, exit code 2, no traceback, no hang.

Reference: the exit codes of the launch contract (0 done, 1 operational, 2 the user's).
"""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from visionloom.data.shards.sample import Image, Message, Sample, Text
from visionloom.data.shards.write import write_shards
from visionloom.launch import configure
from visionloom.launch.configure import start
from visionloom.launch.pretrain import train
from visionloom.tests.data.samples import Pair, essay, picture_question
from visionloom.tests.ranks import RankPool, torchrun_environment
from visionloom.tests.train.runs import run_words
from visionloom.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
DEMO = "+recipe=demo"
ONLY_TWO = [
    f"~phases.{name}"
    for name in ("language", "multimodal", "long", "ultra", "sft", "reasoning", "rl")
]


def unreachable(config: RunConfig) -> None:
    raise AssertionError(
        "a command line that cannot work must be refused before the command starts"
    )


@pytest.mark.parametrize(
    ("words", "ranks", "expected"),
    [
        ([DEMO, "phases.align.steps=many"], 1, ["phases.align.steps", "many", "Integer"]),
        ([DEMO, "run.seed="], 1, ["run.seed", "''", "Integer"]),
        ([DEMO, "run.name="], 1, ["run.name is empty"]),
        ([DEMO, "data.tokenizer="], 1, ["data.tokenizer= is not a folder"]),
        ([DEMO, "data.datasets.text.path="], 1, ["data.datasets.text.path= is not a folder"]),
        (
            [DEMO, "data.datasets.text.path=gone"],
            1,
            ["data.datasets.text.path=gone is not a folder"],
        ),
        ([DEMO, "phases.align.trainable="], 1, ["phases.align.trainable", "list"]),
        ([DEMO, "+run.seed="], 1, ["run.seed", "without the plus"]),
        ([DEMO, "+seed="], 1, ["no such key: seed", "run.seed or"]),
        ([DEMO, "+phases.align.mixture.text="], 1, ["phases.align.mixture.text", "''", "Float"]),
        ([DEMO, "="], 1, ["'=' has no key"]),
        ([DEMO, "+=3"], 1, ["'+=3' has no key"]),
        ([DEMO, "data.workers=-1"], 1, ["data.workers=-1 must be at least 0"]),
        ([DEMO, "phases.align.lr=nan"], 1, ["phases.align.lr=nan", "finite"]),
        ([DEMO, "data.datasets.text.weight=-1"], 1, ["data.datasets.text.weight=-1"]),
        (
            [DEMO, "data.datasets.text.over_length=splt"],
            1,
            ["data.datasets.text.over_length=splt", "did you mean split?"],
        ),
        (
            [DEMO, "data.weights_in=token"],
            1,
            ["data.weights_in=token is unknown", "did you mean tokens?"],
        ),
        ([DEMO, "data.on_change=phase"], 1, ["data.on_change=phase is unknown", "new_phase"]),
        (
            [DEMO, "data.sample_token_multiple=0"],
            1,
            ["data.sample_token_multiple=0 must be at least 1"],
        ),
        ([DEMO, "optim.beta2=1"], 1, ["optim.beta2=1", "below 1"]),
        ([DEMO, "data.max_patches_per_token=0"], 1, ["data.max_patches_per_token=0", "above 0"]),
        ([DEMO, "model.text.kv_heads=0"], 1, ["model.text.kv_heads=0 must be at least 1"]),
        (
            [DEMO, "run.name=fresh", "model.text.vocab_size=256"],
            1,
            ["data.tokenizer=", "ids up to 511", "rows for 0 to 255", "vocab_size=512"],
        ),
        (
            [DEMO, "run.name=fresh", "model.text.vocab_size=256", "parallel.tensor=2"],
            2,
            ["ids up to 511", "rows for 0 to 255"],
        ),
        (
            [DEMO, "parallel.tensor=3"],
            3,
            ["parallel.tensor=3", "model.text.heads=4", "kv_heads=2", "divisor"],
        ),
        ([DEMO, "parallel.tensor=2"], 3, ["3 ranks cannot hold tensor 2", "multiple of 2 ranks"]),
        (
            [DEMO, *ONLY_TWO],
            3,
            [
                "phases.towers.global_batch=4",
                "3 data-parallel ranks",
                "multiple of",
                "(likewise align)",
            ],
        ),
        (
            [DEMO, "model=tiny", "parallel.pipeline=3"],
            3,
            ["4 layers cannot be cut evenly into pipeline 3", "parallel.pipeline_layout="],
        ),
        (
            [DEMO, "model=tiny", "parallel.pipeline=2", "parallel.pipeline_layout=Ettt|tttL"],
            2,
            ["holds 6 layers, the model has 4"],
        ),
        (
            [DEMO, "parallel.context=2"],
            2,
            ["data.sample_token_multiple=1 must be a multiple of 4", "parallel.context=2"],
        ),
        (
            [
                DEMO,
                "parallel.context=2",
                "parallel.context_exchange=ulysses",
                "parallel.tensor=2",
                "data.sample_token_multiple=4",
            ],
            4,
            ["ulysses", "kv_heads=2"],
        ),
        ([DEMO, "parallel.expert=2"], 2, ["parallel.expert=2", "model=demo has no experts"]),
        (
            [DEMO, "model=tiny_moe", "parallel.expert=3"],
            3,
            ["parallel.expert=3 does not divide model.text.experts=8"],
        ),
        (
            [DEMO, "parallel.tensor=8"],
            8,
            ["parallel.tensor=8 does not divide model.text.heads=4, model.text.kv_heads=2"],
        ),
        (
            [DEMO, "phases.long.parallel.tensor=4", "parallel.tensor=2"],
            4,
            ["phases.long", "does not divide model.text.kv_heads=2"],
        ),
    ],
)
def test_refused_before_torch(
    words: list[str],
    ranks: int,
    expected: list[str],
    demo_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in torchrun_environment(0, ranks).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(configure, "end_with_parent", lambda: None)  # this process is no rank
    monkeypatch.setenv("VISIONLOOM_DEMO_DATA", str(demo_data))
    with pytest.raises(SystemExit, match="2"):
        start(unreachable, words)
    assert_one_line(capsys.readouterr().err, expected)


def assert_one_line(told: str, expected: list[str]) -> None:
    lines = told.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), told
    assert [part for part in expected if part not in lines[0]] == []


def strip() -> Pair:
    """A chat about a picture 300 times as wide as it is high."""
    question = Message("user", (Image("a.png", 9600, 32), Text("What?")))
    return Sample("strip:1", "chat", (question, Message("assistant", (Text("Nothing."),)))), {
        "a.png": b"never decoded"
    }


def too_wide(folder: Path) -> None:
    write_shards(folder, "own", [essay(1), strip()])


def too_long(folder: Path) -> None:
    write_shards(folder, "own", [essay(1), essay(2, words=4000)])


def too_many_patches(folder: Path) -> None:
    write_shards(folder, "own", [picture_question(1, sides=(256, 256), words=1)])


def emptied_shard(folder: Path) -> None:
    write_shards(folder, "own", [essay(1)])
    (folder / "own-000000.tar").write_bytes(b"")


def lost_shard(folder: Path) -> None:
    write_shards(folder, "own", [essay(1)])
    (folder / "own-000000.tar").unlink()


def no_index(folder: Path) -> None:
    folder.mkdir()


def broken_manifest(folder: Path) -> None:
    write_shards(folder, "own", [essay(1)])
    (folder / "dataset.json").write_text("{")


OPTION = "data.datasets.text"
DATA_FAULTS: dict[str, tuple[Callable[[Path], None], list[str], list[str]]] = {
    "too wide": (too_wide, [], ["dataset text", "strip:1", "9600x32", "above 200", "crop it"]),
    "too long": (
        too_long,
        [],
        [
            "dataset text",
            "essay:2",
            "phases.multimodal.sequence_length",
            f"{OPTION}.over_length=drop",
        ],
    ),
    "too many patches": (
        too_many_patches,
        ["data.max_patches_per_token=0.5"],
        ["dataset text", "picture:1", "256 patches", "data.max_patches_per_token"],
    ),
    "emptied shard": (emptied_shard, [], [OPTION, "own-000000.tar", "index"]),
    "lost shard": (lost_shard, [], [OPTION, "own-000000.tar"]),
    "no index": (no_index, [], [OPTION, "no dataset.json", "python launch/data.py index"]),
    "broken manifest": (broken_manifest, [], [OPTION, "dataset.json"]),
    "no tokenizer": (
        too_long,
        ["data.tokenizer={folder}"],
        ["data.tokenizer", "no tokenizer.json"],
    ),
}


def told(words: list[str]) -> tuple[int, str]:
    """Exit code and what the user reads when this rank starts the command with these words."""
    screen = io.StringIO()
    with contextlib.redirect_stderr(screen):
        try:
            start(train, words)
        except SystemExit as stop:
            return int(stop.code or 0), screen.getvalue()
    return 0, screen.getvalue()


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_data_that_cannot_be_trained_on(
    fault: str, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    make, more, expected = DATA_FAULTS[fault]
    folder = tmp_path / "own"
    make(folder)
    own = [f"{OPTION}.path={folder}", *(word.format(folder=folder) for word in more)]
    ((code, text),) = pool.run(1, told, run_words(demo_data, tmp_path / "run", 4, *own))
    assert code == 2
    assert_one_line(text, expected)


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    """Run words with this Python as a user does: without variables that quieten libraries."""
    dropped = ("PYTHONWARNINGS", "TORCH_CPP_LOG_LEVEL", "TRANSFORMERS_VERBOSITY")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.long
def test_a_whole_run_says_nothing_but_its_own(demo_data: Path, tmp_path: Path) -> None:
    """Libraries warn of absent accelerators at import, at the building of the optimizer and at each checkpoint."""
    words = run_words(
        demo_data, tmp_path / "run", 2, "phases.multimodal.warmup_steps=1", "data.workers=1"
    )
    result = run_command("launch/pretrain.py", *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "multimodal",
        "done",
        "time:",
    ]


@pytest.mark.long
def test_under_torchrun_one_rank_tells_of_the_data(demo_data: Path, tmp_path: Path) -> None:
    """torchrun adds lines of its own and makes the exit code 1; the run's status.json keeps the 2."""
    too_wide(tmp_path / "own")
    words = run_words(demo_data, tmp_path / "run", 4, f"{OPTION}.path={tmp_path / 'own'}")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = run_command(*torchrun, "launch/pretrain.py", *words)
    before_torchrun = result.stderr.partition("torch/distributed/elastic")[0].splitlines()
    assert result.returncode == 1
    assert [line.split(": ")[0] for line in result.stderr.splitlines() if "error:" in line] == [
        "error"
    ]
    assert "strip:1" in before_torchrun[0]
    assert '"code": 2' in (tmp_path / "run" / "status.json").read_text()


@pytest.mark.long
def test_under_torchrun_more_ranks_than_packs(demo_data: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3")
    result = run_command(
        *torchrun, "launch/pretrain.py", *run_words(demo_data, tmp_path / "run", 4)
    )
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "phases.multimodal.global_batch=4" in line and "3 data-parallel ranks" in line
