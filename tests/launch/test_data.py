"""The command data.py: what it prints and how it ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Image, Sample, Text, Video
from visionloom.data.shards.write import write_shards
from visionloom.launch.data import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    content = (Text("x"), Image("a.png", 1, 1), Video(("b.png", "c.png"), (0.0, 1.0), 1, 1))
    media = dict.fromkeys(("a.png", "b.png", "c.png"), b"x")
    write_shards(
        tmp_path / "some",
        "some",
        [(Sample(f"s:{i}", "doc", content=content, task="t"), media) for i in range(7)],
    )
    return tmp_path / "some"


def test_stats_counts_samples_media_and_tasks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["stats", str(folder.parent)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "some" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "some",
        "7",
        "1",
        "0.0",
        "0.0",
        "7",
        "7",
        "14",
        "0.00",
        "0.000",
        "t 7",
    ]


def test_index_makes_a_folder_of_tars_readable(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "dataset.json").unlink()
    assert main(["index", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{folder}: 7 samples in 1 shards\n" in out
    assert "21 media members have a header that cannot be read" in out
    assert len(Dataset.open(folder, "some")) == 7


def test_index_goes_on_without_bad_samples_when_asked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (folder / "some-000000.tar").read_bytes()
    (folder / "more.tar").write_bytes(content.replace(b'"id":"s:3"', b'"id":"s"3"'))
    with pytest.raises(SystemExit) as caught:
        main(["index", str(folder), "--workers", "1"])
    assert caught.value.code == 2
    assert f"error: {folder / 'more.tar'}: at byte " in capsys.readouterr().err
    assert main(["index", str(folder), "--workers", "1", "--skip-bad"]) == 0
    assert (
        f"some samples were left out: see {folder / 'left_out.jsonl'}\n" in capsys.readouterr().out
    )
    assert len(Dataset.open(folder, "some")) == 13


def test_a_key_of_a_record_is_part_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "x.json").write_text(
        json.dumps([{"conversations": turns, "a\n\x1b[2Jerror: b": 1}])
    )
    assert (
        main(
            ["convert", "llava", str(tmp_path / "x.json"), str(tmp_path / "out"), "--workers", "1"]
        )
        == 0
    )
    assert "    1 record key a\\n\\x1b[2Jerror: b (first: x.json:0)\n" in capsys.readouterr().out


def test_verify_exits_with_1_if_anything_is_bad(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(folder), "--workers", "1"]) == 1
    assert (
        f"{folder}: 21 bad members, listed in {folder / 'verify.jsonl'}\n"
        in capsys.readouterr().out
    )
    assert len((folder / "verify.jsonl").read_text().splitlines()) == 21
    write_shards(folder.parent / "good", "good", [(Sample("s", "doc", content=(Text("x"),)), {})])
    assert main(["verify", str(folder.parent / "good"), "--decode"]) == 0
    assert "all good" in capsys.readouterr().out


def test_export_energon_names_its_splits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export-energon", str(folder)]) == 0
    assert f"{folder}: train 1 shards, val 0 shards, test 0 shards\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["export-energon", str(folder), "--split", "train"])
    assert capsys.readouterr().err == "error: --split train: NAME=SHARE expected, like train=0.9\n"


@pytest.mark.parametrize("command", ["index", "stats", "verify", "export-energon"])
def test_a_users_error_is_one_line_and_exit_code_2(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, str(tmp_path)])
    captured = capsys.readouterr()
    assert (caught.value.code, captured.out) == (2, "")
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_the_demo_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    command = ["demo", str(tmp_path / "demo"), "--scale", "0.001"]
    assert main(command) == 0
    assert "train/vqa: 8 samples\n" in capsys.readouterr().out
    assert main(command) == 0
    assert "already made" in capsys.readouterr().out


def test_the_command_line_does_not_wait_for_torch() -> None:
    script = "import sys, visionloom.launch.data as d; d.make_parser(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
