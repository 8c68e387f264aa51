"""The command generate.py: shards in, shards out, the same in every layout and after a kill; answers are transformers'.

References: transformers' Qwen3VLForConditionalGeneration.generate on the exported folder; one process; a run that nobody cut off.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from visionloom.data.encode.encode import encode
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.shards import write_parts
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Message, Sample, Text, Video
from visionloom.data.shards.write import write_shards
from visionloom.launch.generate import main
from visionloom.tests.ranks import RankPool, torchrun_environment
from visionloom.tests.train.generation.models import transformers_answer
from visionloom.tests.train.runs import run_config, run_words
from visionloom.train.config import RunConfig
from visionloom.train.generation.answered import Prompts, answer_content
from visionloom.train.run import pretrain

STEPS = 4
OPTIONS = (
    "generation.temperature=1.2",
    "generation.answers=2",
    "generation.max_new_tokens=6",
    "generation.part_prompts=5",
)
LAYOUTS: dict[str, tuple[str, int, list[str]]] = {
    "tensor2": ("tiny", 2, ["parallel.tensor=2"]),
    "pipeline2": ("tiny", 2, ["parallel.pipeline=2"]),
    "tensor2 pipeline2": ("tiny", 4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "expert2": ("tiny_moe", 2, ["parallel.expert=2"]),
}
GREEDY = ("generation.temperature=0", "generation.max_new_tokens=16")


def train(config: RunConfig) -> None:
    pretrain(config)


def export(stored: Path, out: Path) -> None:
    """The command; runs on a rank of the pool."""
    from visionloom.launch.convert import main as convert

    assert convert(["export", f"checkpoint={stored}", f"out={out}"]) == 0


def run_command(words: list[str], parts: int = 10**6) -> int:
    """The command on every rank of the pool, as torchrun starts it, killed after some parts; returns its exit code."""
    written: list[int] = []
    write = write_parts.write_part

    def limited(reader: Any, target: Any, numbered: Any) -> None:
        if len(written) >= parts:
            raise SystemExit(130)
        written.append(numbered[0])
        write(reader, target, numbered)

    environment = torchrun_environment(dist.get_rank(), dist.get_world_size())
    with (
        patch.dict(os.environ, environment),
        patch("visionloom.train.generation.run.write_part", limited),
    ):
        try:
            main(words)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def trained(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    pool.run(1, train, run_config(demo_data, folder, STEPS, 1))
    return folder


@pytest.fixture(scope="module")
def prompts(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve samples with pictures, videos and several turns; one is a document."""
    folder = tmp_path_factory.mktemp("prompts") / "mixed"
    write_shards(folder, "mixed", mixed(demo_data))
    return folder


def first_of(
    demo_data: Path, names: Sequence[str], count: int
) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    """The first samples of each of the demo's datasets, with their media."""
    for name in names:
        dataset = Dataset.open(demo_data / "train" / name, name)
        for index in range(count):
            sample = dataset.sample(index)
            yield sample, {ref: dataset.member(index, ref) for ref in sample.refs}


def mixed(demo_data: Path) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    yield from first_of(demo_data, ("captions", "vqa", "video", "sums", "documents"), 2)
    again = (Message("user", (Text("3 + 4?"),)), Message("assistant", (Text("7"),)))
    yield Sample("asked again", "chat", (*again, Message("user", (Text("Sure?"),)))), {}
    yield Sample("a text", "doc", content=(Text("Once."),)), {}


@pytest.fixture(scope="module")
def alone(
    pool: RankPool, demo_data: Path, trained: Path, prompts: Path, tmp_path_factory: Any
) -> Path:
    """What one process writes."""
    out: Path = tmp_path_factory.mktemp("alone") / "out"
    assert pool.run(1, run_command, words_of(demo_data, trained, prompts, out)) == [0]
    return out


def words_of(data: Path, run: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    return run_words(data, run, STEPS, f"prompts={prompts}", f"out={out}", *OPTIONS, *more)


def samples_of(folder: Path) -> list[Sample]:
    dataset = Dataset.open(folder, folder.name)
    return [dataset.sample(index) for index in range(len(dataset))]


def facts_of(folder: Path) -> dict[str, Any]:
    return {sample.id: sample.meta["generation"] for sample in samples_of(folder)}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_each_prompt_is_written_with_its_answers(
    alone: Path, demo_data: Path, trained: Path, prompts: Path
) -> None:
    """The turns before are the source's, the last one is what was drawn, and training reads the same tokens."""
    config = run_config(demo_data, trained, STEPS, 1)
    tokenizer = Tokenizer(config.data.tokenizer)
    source = Dataset.open(prompts, "mixed")
    by_key = {source.location(index).key: index for index in range(len(source))}
    written = samples_of(alone)
    chats = [index for index in range(len(source)) if source.sample(index).kind == "chat"]
    assert len(written) == 2 * len(chats) and 0 < len(chats) < len(source)
    same = 0
    for number, sample in enumerate(written):
        facts = sample.meta["generation"]
        before = source.sample(by_key[facts["source"]])
        assert facts["source_id"] == before.id == source.sample(chats[number // 2]).id
        assert facts["answer"] == number % 2 and sample.id == f"{before.id}-{number % 2}"
        ends_with_answer = before.messages[-1].role == "assistant"
        assert sample.messages[:-1] == before.messages[: -1 if ends_with_answer else None]
        answer = encode(before, tokenizer, config.data.media).answer if ends_with_answer else None
        assert facts["reference"] == answer
        assert sample.messages[-1].content == answer_content(facts["token_ids"], tokenizer)
        count = len(facts["token_ids"])
        assert count == len(facts["log_probabilities"]) == len(facts["sampling_log_probabilities"])
        assert 1 <= count <= 6 and facts["stopped"] == (
            facts["token_ids"][-1] in tokenizer.stop_ids
        )
        encoded = encode(sample, tokenizer, config.data.media)
        drawn = facts["token_ids"][: -1 if facts["stopped"] else None]
        read = encoded.input_ids[encoded.prompt_length :].tolist()
        assert facts["same_tokens"] == (read[:-2] == drawn)
        same += facts["same_tokens"]
    # An untrained model draws bytes that are no characters: their text has other tokens.
    assert 0 < same < len(written)
    assert "a document is no prompt" in (alone / "skipped.jsonl").read_text()


def test_thoughts_become_thoughts(demo_data: Path) -> None:
    """Reference: the samples that the demo's reasoning is taught with."""
    tokenizer = Tokenizer(str(demo_data / "tokenizer"))
    config = run_config(demo_data, Path("unused"), STEPS, 1)
    dataset = Dataset.open(demo_data / "train" / "sums", "sums")
    source = Prompts(dataset, tokenizer, config.data.media)
    for index in range(5):
        sample = dataset.sample(index)
        encoded = encode(sample, tokenizer, config.data.media)
        answer = encoded.input_ids[encoded.prompt_length : -1].tolist()
        assert answer_content(answer, tokenizer) == sample.messages[-1].content
        assert source.read(index).encoded.prompt_length == encoded.prompt_length


@pytest.mark.parametrize("words", [[], ["parallel.tensor=2"]])
def test_ranks_change_no_answer(
    words: list[str],
    alone: Path,
    pool: RankPool,
    demo_data: Path,
    trained: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    command = words_of(demo_data, trained, prompts, out, *words)
    assert pool.run(2, run_command, command) == [0, 0]
    found, expected = facts_of(out), facts_of(alone)
    assert list(found) == list(expected)
    for name, facts in found.items():
        assert facts["token_ids"] == expected[name]["token_ids"]
        for key in ("log_probabilities", "sampling_log_probabilities"):
            np.testing.assert_allclose(facts[key], expected[name][key], rtol=0, atol=1e-5)


def test_a_killed_command_goes_on(
    alone: Path, pool: RankPool, demo_data: Path, trained: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = words_of(demo_data, trained, prompts, out)
    assert pool.run(1, run_command, command, 1) == [130]
    assert not (out / "dataset.json").exists() and (out / ".converting").exists()
    # Other answers would not belong to those that are there.
    assert pool.run(1, run_command, [*command, "generation.seed=1"]) == [2]
    assert pool.run(1, run_command, command, 2) == [0]
    assert bytes_of(out) == bytes_of(alone)
    # Nothing is left to do.
    assert pool.run(1, run_command, command, 0) == [0]
    assert bytes_of(out) == bytes_of(alone)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["out=x"], "prompts= is missing: name a folder, prompts=DIR"),
        (["prompts={prompts}"], "out= is missing"),
        (["prompts=gone", "out=x"], "prompts=gone is not a folder"),
        (["prompts={prompts}", "out=x", "checkpoint=gone"], "checkpoint=gone is not a folder"),
        (["prompts={prompts}", "out=~/x"], "the shell has not replaced ~"),
        (
            ["prompts={prompts}", "out=x", "generation.top_p=0"],
            "generation.top_p=0 must be above 0",
        ),
        (["prompts={prompts}", "out=x", "generation.temperature=-1"], "generation.temperature=-1"),
        (["prompts={prompts}", "out={prompts}"], "already holds a dataset"),
        (["prompts={data}", "out=x"], "dataset.json"),
        (["prompts={prompts}", "out=x", "generation.stop=[nope]"], "generation.stop: 'nope' is no"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    expected: str,
    pool: RankPool,
    demo_data: Path,
    trained: Path,
    prompts: Path,
    tmp_path: Path,
) -> None:
    places = {"prompts": prompts, "data": demo_data}
    filled = [word.format(**places) for word in words]
    ((code, told),) = pool.run(1, told_by, run_words(demo_data, trained, STEPS, *filled), tmp_path)
    assert code == 2 and expected in told
    assert told.count("error:") == 1 and "Traceback" not in told


def told_by(words: list[str], folder: Path) -> tuple[int, str]:
    """The exit code of the command and what it prints on standard error."""
    import contextlib
    import io

    told = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(told):
        code = run_command(words)
    return code, told.getvalue()


# ---- the answers of transformers, for 200 prompts


def by_transformers(exported: Path, prompts: Path, config: RunConfig) -> dict[str, list[int]]:
    """Greedy tokens of each prompt by the exported folder; runs on a rank of the pool."""
    from transformers import AutoModelForImageTextToText

    theirs = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = Tokenizer(config.data.tokenizer)
    source = Prompts(Dataset.open(prompts, "prompts"), tokenizer, config.data.media)
    answers = {}
    for index in range(len(source.dataset)):
        prompt = source.read(index)
        found = transformers_answer(
            theirs, prompt.encoded, 16, eos_token_id=list(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id
        )  # fmt: skip
        answers[prompt.sample.id] = found[0, len(prompt.encoded.input_ids) :].tolist()
    return answers


def two_hundred(demo_data: Path) -> Iterator[tuple[Sample, dict[str, bytes]]]:
    yield from first_of(demo_data, ("vqa", "video", "sums", "documents", "grounding"), 40)


@pytest.mark.long
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_hundred_greedy_answers_are_those_of_transformers(
    name: str, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    model, ranks, words = LAYOUTS[name]
    folder, prompts = tmp_path / "run", tmp_path / "prompts"
    write_shards(prompts, "prompts", two_hundred(demo_data))
    written = samples_of(prompts)
    assert len(written) == 200 and any(sample.images for sample in written)
    assert any(isinstance(one, Video) for sample in written for one in sample.elements)

    learning = ("phases.multimodal.lr=4.0e-3", f"model={model}")
    config = run_config(demo_data, folder, 60, 1, *learning)
    pool.run(1, train, config)
    (stored,) = (folder / "checkpoints" / "multimodal").glob("step-*")
    pool.run(1, export, stored, tmp_path / "exported")
    (expected,) = pool.run(1, by_transformers, tmp_path / "exported", prompts, config)
    out = tmp_path / "out"
    command = run_words(
        demo_data, folder, 60, *learning, f"prompts={prompts}", f"out={out}", *GREEDY, *words
    )
    assert pool.run(ranks, run_command, command) == [0] * ranks
    found = {facts["source_id"]: facts["token_ids"] for facts in facts_of(out).values()}
    assert found == expected
    assert len({tuple(tokens) for tokens in expected.values()}) >= 5
