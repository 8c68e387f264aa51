"""Damaged forms of all that train/ reads from disk: an error of ours or success, in bounded time and memory (tests/fuzzing.py).

References: files that torch, Python's json and our own runs wrote. Pickles are damaged opcode by opcode too, as Python's pickletools
takes them apart.
"""

import json
import pickletools
import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from visionloom.common.errors import UserError
from visionloom.common.settings import check
from visionloom.data.config import MediaConfig
from visionloom.data.plan.cursor import check_state
from visionloom.model.config import ModelConfig, TextConfig
from visionloom.model.huggingface.config import write_config
from visionloom.model.lora_config import LoraConfig
from visionloom.tests.fuzzing import (
    BYTE_MUTATORS,
    Mutator,
    amount,
    json_edit,
    json_lines_edit,
    mutants,
    try_reader,
)
from visionloom.tests.train.report.test_page import line, write_run
from visionloom.tests.train.strangers import list_files, write_checkpoint
from visionloom.train.agreements import check_folder
from visionloom.train.checkpoint.index import INDEX, IndexFault, read_index
from visionloom.train.checkpoint.read import FORMAT, MANIFEST, fault_in_share
from visionloom.train.checkpoint.state_file import (
    STATE,
    Inputs,
    lora_of,
    model_of,
    read_run_state,
    stored_inputs,
)
from visionloom.train.checkpoint.stored import StoredWeights
from visionloom.train.exchange.companions import (
    SETTINGS_OF_RUN,
    Companions,
    companions,
    tokenizer_hash,
)
from visionloom.train.exchange.serving import carry_companions, write_serving_files
from visionloom.train.exchange.token_table import SETTINGS, TOKENIZER, TokenTable
from visionloom.train.report import page as report
from visionloom.train.report import sections
from visionloom.train.report.history import History

SHARD = "__0_0.distcp"
Reader = Callable[[bytes], object]
SEEDS = [pytest.param(1, id="few"), pytest.param(3, id="many", marks=pytest.mark.faults)]
"""How many times the usual number of inputs."""
SNIPPETS = (
    b"cposix\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b"ctorch\nSize\n", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"\x82\x01", b"\x88",
    b"\x8a\xff" + b"\x7f" * 255, b"\x8b\xff\xff\xff\x7f", b"(", b"}", b"]", b")", b"R", b"\x81", b"b", b"s", b"u", b"a", b"e", b"0", b"1", b"2",
    b"\x95" + b"\xff" * 8, b"\x96" + b"\x7f" * 8, b"\x8d" + b"\x7f" * 8, b"I999\n", b"L" + b"9" * 5000 + b"L\n", b"Pa\n", b"Q", b"\x85" * 1000, b".",
)  # fmt: skip
"""Pieces of pickles: calls, places of the memo, sizes and numbers that a file only claims."""


def opcode_edit(random: Random, data: bytes) -> bytes:
    """A pickle with an opcode removed, doubled, moved, put in or given another argument."""
    try:
        places = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    except Exception:  # damaged before
        return random.choice(BYTE_MUTATORS)(random, data)
    parts = [data[begin:end] for begin, end in pairwise(places)]
    at, other = random.randrange(len(parts)), random.randrange(len(parts))
    match random.randrange(5):
        case 0:
            del parts[at]
        case 1:
            parts.insert(at, parts[other])
        case 2:
            parts[at], parts[other] = parts[other], parts[at]
        case 3:
            parts.insert(at, random.choice(SNIPPETS))
        case _:
            parts[at] = parts[at][:1] + random.choice(BYTE_MUTATORS)(random, parts[at][1:])
    return b"".join(parts)


JSON: tuple[Mutator, ...] = (json_edit, json_edit, json_edit, *BYTE_MUTATORS)
LINES: tuple[Mutator, ...] = (json_lines_edit, json_lines_edit, *BYTE_MUTATORS)
PICKLE: tuple[Mutator, ...] = (opcode_edit, opcode_edit, *BYTE_MUTATORS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_checkpoint(tmp_path / "run" / "checkpoints" / "sft" / "step-00000004")
    state = json.loads((made / STATE).read_text())
    inputs = Inputs("/nowhere", "0" * 64, asdict(MediaConfig()), "/nowhere/else")
    state |= {"lora": asdict(LoraConfig(rank=8)), "inputs": asdict(inputs)}
    (made / STATE).write_text(json.dumps(state))
    return made


def fuzz(
    name: str,
    path: Path,
    read: Callable[[], object],
    count: int,
    mutators: tuple[Mutator, ...],
    allowed: Any = UserError,
) -> None:
    """Put damaged forms of a file into its place and read."""
    kinds = allowed if isinstance(allowed, tuple) else (allowed,)

    def replaced(data: bytes) -> object:
        path.write_bytes(data)
        return read()

    try_reader(replaced, mutants([path.read_bytes()], amount(count), mutators), kinds, name)


def read_state(folder: Path) -> None:
    run_state = read_run_state(folder)
    tokenizer_hash(run_state)
    for part in (model_of, lora_of, stored_inputs):
        part(run_state)
    companions(folder, run_state)
    check_state(run_state.data)


def read_weights(folder: Path) -> None:
    weights = StoredWeights(folder)
    for name in weights.tensors:
        weights.parameter(name)


@pytest.mark.parametrize("times", SEEDS)
def test_manifests(times: int, folder: Path) -> None:
    fuzz(
        "manifest.json",
        folder / MANIFEST,
        lambda: fault_in_share(folder, 0, 1),
        60 * times,
        JSON,
        (),
    )
    fuzz(
        "metadata.json",
        folder / FORMAT,
        lambda: (list_files(folder), fault_in_share(folder, 0, 1)),
        20 * times,
        JSON,
        (),
    )


@pytest.mark.parametrize("times", SEEDS)
def test_states(times: int, folder: Path) -> None:
    fuzz("state.json", folder / STATE, lambda: read_state(folder), 100 * times, JSON)


@pytest.mark.parametrize("times", SEEDS)
def test_settings_of_older_runs(times: int, folder: Path) -> None:
    state = json.loads((folder / STATE).read_text()) | {"inputs": {}}
    (folder / STATE).write_text(json.dumps(state))
    settings = folder.parents[2] / SETTINGS_OF_RUN
    sections = {
        "run": {"folder": "runs/x"},
        "data": {"tokenizer": "t", "media": asdict(MediaConfig())},
        "init": {"huggingface": "h"},
    }
    settings.write_text(json.dumps(sections))
    fuzz(
        "config.yaml",
        settings,
        lambda: companions(folder, read_run_state(folder)),
        60 * times,
        JSON,
    )


@pytest.mark.parametrize("times", SEEDS)
def test_indices(times: int, folder: Path) -> None:
    fuzz("index", folder / INDEX, lambda: read_index(folder), 200 * times, PICKLE, IndexFault)
    fuzz("weights by an index", folder / INDEX, lambda: read_weights(folder), 60 * times, PICKLE)


@pytest.mark.parametrize("times", SEEDS)
def test_tensors(times: int, folder: Path) -> None:
    fuzz("tensors", folder / SHARD, lambda: read_weights(folder), 150 * times, BYTE_MUTATORS)


@pytest.mark.parametrize("times", SEEDS)
def test_whole_folders(times: int, folder: Path, tmp_path: Path) -> None:
    """Any file of a checkpoint damaged, under a manifest that agrees: what verifying lets through can be read, or is an error of ours."""
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = sorted(good)

    def read(data: bytes) -> None:
        name, _, content = data.partition(b"\0")
        for other, bytes_ in good.items():
            (folder / other).write_bytes(content if other.encode() == name else bytes_)
        if name.decode() != MANIFEST:
            list_files(folder)
        if fault_in_share(folder, 0, 1) is None:
            read_state(folder)
            read_weights(folder)

    inputs = [
        name.encode() + b"\0" + data
        for seed, name in enumerate(names)
        for data in mutants(
            [good[name]], amount(12 * times), PICKLE if name == INDEX else BYTE_MUTATORS, seed
        )
    ]
    try_reader(read, inputs, (UserError,), "checkpoint")


@pytest.mark.parametrize("times", SEEDS)
def test_tokenizers(times: int, demo_data: Path, tmp_path: Path) -> None:
    made = tmp_path / "tokenizer"
    shutil.copytree(demo_data / "tokenizer", made)
    fuzz(
        "tokenizer.json",
        made / TOKENIZER,
        lambda: TokenTable.read(made, "x").cut("a b <|im_end|>"),
        60 * times,
        JSON,
    )
    shutil.copyfile(demo_data / "tokenizer" / TOKENIZER, made / TOKENIZER)
    settings = made / SETTINGS
    if not settings.exists():
        settings.write_text(
            json.dumps(
                {
                    "eos_token": {"content": "<|im_end|>"},
                    "added_tokens_decoder": {"3": {"content": "x"}},
                }
            )
        )
    fuzz("tokenizer_config.json", settings, lambda: TokenTable.read(made, "x"), 40 * times, JSON)


@pytest.mark.parametrize("times", SEEDS)
def test_what_goes_along(times: int, demo_data: Path, tmp_path: Path) -> None:
    """Into an export: preprocessors, generation settings, chat template, config.json."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(demo_data / "tokenizer", source)
    size = {"longest_edge": 9, "shortest_edge": 4}
    contents: dict[str, Any] = {
        "preprocessor_config.json": {"size": size, "min_pixels": 3, "patch_size": 16},
        "processor_config.json": {
            "video_processor": {"size": size, "fps": 2},
            "image_processor": {"size": size},
        },
        "generation_config.json": {"eos_token_id": [1, 2], "bos_token_id": 3, "temperature": 0.7},
        "chat_template.json": {"chat_template": "{{ x }}"},
    }
    for name, content in contents.items():
        (source / name).write_text(json.dumps(content))

    def export() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        files = Companions(source, [source], MediaConfig())
        write_serving_files(out, files, carry_companions(files, out))

    for name, content in contents.items():
        fuzz(name, source / name, export, 10 * times, JSON)
        (source / name).write_text(json.dumps(content))


@pytest.mark.parametrize("times", SEEDS)
def test_agreements(times: int, demo_data: Path, tmp_path: Path) -> None:
    """What an import compares: config.json, the tokenizer's files, generation settings and preprocessors."""
    made, model = tmp_path / "model", ModelConfig(text=TextConfig(vocab_size=512))
    shutil.copytree(demo_data / "tokenizer", made)
    contents: dict[str, Any] = {
        "config.json": write_config(model, "bfloat16", {}, None) | {"eos_token_id": 488},
        "generation_config.json": {"eos_token_id": [488, 486], "pad_token_id": 486},
        "added_tokens.json": {"<|im_end|>": 488},
        "tokenizer_config.json": {
            "eos_token": {"content": "<|im_end|>"},
            "added_tokens_decoder": {"488": {"content": "<|im_end|>"}},
        },
        "preprocessor_config.json": {
            "patch_size": 16,
            "image_mean": [0.5, 0.5, 0.5],
            "rescale_factor": 0.00392156862745098,
        },
        "processor_config.json": {
            "image_processor": {"patch_size": 16},
            "video_processor": {"merge_size": 2},
        },
    }
    for name, content in contents.items():
        (made / name).write_text(json.dumps(content))
    for name in contents:
        good = (made / name).read_bytes()
        fuzz(f"{name} compared", made / name, lambda: check_folder(made, "hf"), 20 * times, JSON)
        (made / name).write_bytes(good)


@pytest.mark.parametrize("times", SEEDS)
def test_reports(times: int, tmp_path: Path) -> None:
    """What a report is made of; drawing it costs a second, so that few are drawn."""
    write_run(tmp_path)
    lines = "".join(json.dumps(line(step, "align")) + "\n" for step in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text(lines)

    def read() -> None:
        history = History.read(tmp_path)
        for part in (sections.header, sections.results, sections.phases, sections.notes):
            part(history)
        _ = (history.sources, history.name, history.last_step)

    for name, mutators in (
        ("metrics.jsonl", LINES),
        ("events.jsonl", LINES),
        ("eval.json", JSON),
        ("config.yaml", BYTE_MUTATORS),
    ):
        good = (tmp_path / name).read_bytes()
        fuzz(name, tmp_path / name, read, 30 * times, mutators, ())
        (tmp_path / name).write_bytes(good)
    fuzz(
        "report",
        tmp_path / "metrics.jsonl",
        lambda: report.write_report(tmp_path, []),
        max(1, times // 2),
        LINES,
        (),
    )


def test_the_machinery_finds_what_it_should(folder: Path) -> None:
    """The control: Python's own reader of the same pickles does what ours must not."""
    import pickle

    with pytest.raises(AssertionError, match="faults in"):
        fuzz(
            "pickle",
            folder / INDEX,
            lambda: pickle.loads((folder / INDEX).read_bytes()),
            40,
            PICKLE,
            IndexFault,
        )
    assert check(ModelConfig(), "model").lines == []
