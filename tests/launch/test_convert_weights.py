"""The command convert.py: its words, its errors and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from visionloom.launch.convert import COMMANDS, main
from visionloom.tests.model.huggingface.test_folder import edit_config, model, save
from visionloom.tests.ranks import torchrun_environment

ROOT = Path(__file__).parents[2]


def ended(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and what was printed as errors."""
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("hf")
    save(made, model())
    return made


@pytest.mark.parametrize(
    "words", [[], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=str
)
def test_help_names_every_option(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    shown = capsys.readouterr().out
    known = (
        [*COMMANDS[words[0]].required, *COMMANDS[words[0]].optional]
        if words[1:]
        else [f"convert.py {n}" for n in COMMANDS]
    )
    assert all(option in shown for option in known)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["improt"], "no such command: improt (did you mean import?): use one of "),
        (["import", "hf=x"], "import needs out=..."),
        (["import"], "import needs hf=... and out=..."),
        (["import", "hf=x", "out"], "command line: cannot read 'out': write option=value"),
        (
            ["export", "chekpoint=x", "out=y"],
            "export has no option chekpoint (did you mean checkpoint?): use ",
        ),
        (
            ["export", "checkpoint=x", "out=y", "parallel.tensor=2"],
            "export has no option parallel.tensor",
        ),
        (
            ["export", "checkpoint=.", "out=y", "dtype=int8"],
            "dtype=int8 is unknown: use one of bf16, fp16, fp32",
        ),
        (
            ["export", "checkpoint=.", "out=y", "layout=hugging"],
            "layout=hugging is unknown: use one of transformers, hub",
        ),
        (
            ["export", "checkpoint=.", "out=y", "shard=5"],
            "shard=5 is not a size: write 500MB or 5GB",
        ),
        (["export", "checkpoint=nowhere", "out=y"], "checkpoint=nowhere is not a folder"),
        (["import", "hf=nowhere", "out=y"], "hf=nowhere: no config.json there"),
        (
            ["import", "hf=FOLDER", "out=y", "parallel.tensr=2"],
            "no such key: parallel.tensr (did you mean tensor?)",
        ),
        (
            ["import", "hf=FOLDER", "out=y", "parallel.tensor=two"],
            "parallel.tensor=two must be a whole number",
        ),
        (["import", "hf=FOLDER", "out=y", "parallel.tensor=2"], "1 ranks cannot hold tensor 2"),
    ],
    ids=str,
)
def test_a_wrong_word_is_one_line(
    words: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, error = ended([word.replace("FOLDER", str(folder)) for word in words], capsys)
    assert code == 2 and error.startswith(f"error: {told}") and error.count("\n") == 1


def test_a_layout_that_does_not_fit_is_told_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in torchrun_environment(0, 3).items():
        monkeypatch.setenv(name, value)
    code, error = ended(["import", f"hf={folder}", "out=y", "parallel.tensor=3"], capsys)
    assert code == 2 and "parallel.tensor=3" in error and not Path("y").exists()


def run(words: list[str], ranks: int = 0) -> subprocess.CompletedProcess[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks
        else []
    )
    command = [sys.executable, *launcher, "launch/convert.py", *words]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_wrong_folder_is_refused_without_torch(folder: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / '.link')!r})\n"
        "from visionloom.launch.convert import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    )
    reading = [sys.executable, "-c", code, "import", f"hf={tmp_path}", "out=y"]
    assert subprocess.run(reading, capture_output=True, text=True).stdout == "2 False\n"


@pytest.mark.long
def test_the_command_under_torchrun(folder: Path, tmp_path: Path) -> None:
    """Two ranks import in a layout and export; a broken folder ends with one line and status 1, torchrun's own."""
    stored, out = tmp_path / "stored", tmp_path / "out"
    done = run(["import", f"hf={folder}", f"out={stored}", "parallel.tensor=2"], 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"done: start from it with init.checkpoint={stored}"
    done = run(["export", f"checkpoint={stored}", f"out={out}", "shard=0.5MB"], 2)
    assert done.returncode == 0, done.stderr
    assert {line.split(":")[0] for line in done.stdout.splitlines()} == {"rank 0", "rank 1", "done"}
    assert len(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]) == 134
    edit_config(out, "text_config", num_hidden_layers=5)
    alone, both = (
        run(["import", f"hf={out}", f"out={tmp_path / 'c'}"]),
        run(["import", f"hf={out}", f"out={tmp_path / 'd'}"], 2),
    )
    assert (alone.returncode, both.returncode) == (2, 1)
    for done in (alone, both):
        told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert len(told) == 1 and "missing: model.language_model.layers.4." in told[0]
