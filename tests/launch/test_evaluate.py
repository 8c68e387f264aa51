"""The command evaluate.py: the newest checkpoint, the same results in every layout, greedy answers.

References: token-by-token greedy decoding of one sample at a time by our model, and transformers'
Qwen3VLForConditionalGeneration.generate. Of evaluation.command: the safetensors library, which counts the numbers of the export,
against transformers' count of the model; a file of results in the form that lmms-eval writes.
"""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import PIL.Image
import pytest
import torch
import torch.distributed as dist

from visionloom.common.errors import UserError
from visionloom.data.encode.encode import EncodedSample, extend, prompt_of
from visionloom.data.encode.tokenizer import IMAGE, VIDEO, Tokenizer
from visionloom.data.stream.batch import pack_prompts
from visionloom.data.stream.held_out import EvaluationSet
from visionloom.launch.data import main as convert
from visionloom.launch.evaluate import main
from visionloom.model.huggingface.names import to_huggingface
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel import topology as topologies
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import huggingface_model
from visionloom.tests.ranks import RankPool, torchrun_environment
from visionloom.tests.train.generation.models import transformers_answer
from visionloom.tests.train.runs import DATASETS, run_config, run_words
from visionloom.train.build import newest_weights, open_topology
from visionloom.train.config import RunConfig
from visionloom.train.evaluate import predictions, print_results
from visionloom.train.observe.screen import Screen
from visionloom.train.report.history import NO_TASKS
from visionloom.train.run import evaluate, held_out, pretrain, trained_checkpoint

STEPS = 60
MOST_TOKENS = 10
WORDS = (
    "phases.multimodal.global_batch=2",
    "phases.multimodal.micro_batch=1",
    "phases.multimodal.lr=4.0e-3",
    "evaluation.samples=4",
    f"evaluation.max_new_tokens={MOST_TOKENS}",
    "evaluation.pack_tokens=300",
)
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "data2": (2, []),
    "tensor2": (2, ["parallel.tensor=2"]),
    "pipeline2 virtual2": (
        2,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "phases.multimodal.global_batch=4"],
    ),
    "context2": (2, ["parallel.context=2", "data.sample_token_multiple=4"]),
}
LONGER = ("data2", "pipeline2 virtual2")
"""A minute together: proofs."""
Answers = dict[str, str]
FEW = (*WORDS, "evaluation.samples=1", "evaluation.max_new_tokens=1",
    *(f"~data.validation.{name}" for name in DATASETS if name != "text"))  # fmt: skip
PROGRAM = """
import json, os, sys
from pathlib import Path
from safetensors import safe_open
model, out = map(Path, sys.argv[1:])
assert json.loads((model / "config.json").read_text())["model_type"] == "qwen3_vl"
numbers = 0
for path in model.glob("*.safetensors"):
    with safe_open(path, "numpy") as file:
        for name in file.keys():
            size = 1
            for length in file.get_slice(name).get_shape():
                size *= length
            numbers += size
metrics = {"alias": " - toy", "acc,none": 0.25, "acc_stderr,none": float("nan"), "<b>deep</b>": {"numbers": numbers}}
metrics |= {"is_a_rank": int("WORLD_SIZE" in os.environ), "flag": True, "samples": [1, 2], "huge": 10**400}
(out / "of model").mkdir()
document = {"results": {"toy": metrics}, "configs": {"toy": {"shots": 5}}, "date": 1.7e9}
(out / "of model" / "1_results.json").write_text(json.dumps(document))
(out / "plain.json").write_text('{"score": 3}')
(out / "broken.json").write_text('{"score": 4')
(out / "link.json").symlink_to(model / "config.json")
"""


def train(config: RunConfig) -> None:
    pretrain(config)


def trained_model(config: RunConfig) -> tuple[Topology, list[Qwen3VL]]:
    """The chunks of the model of a run's newest checkpoint, as `evaluate` takes it."""
    topology = open_topology(config)
    trained = trained_checkpoint(config, "", topology, Screen(False, 1))
    return topology, newest_weights(config, topology, trained)


def evaluate_on_ranks(config: RunConfig) -> tuple[dict[str, Any], Answers]:
    """What `evaluate` returns, and all answers of this copy of the model by sample."""
    topology, chunks = trained_model(config)
    samples = config.evaluation.samples
    found = [
        prediction
        for name in DATASETS
        for prediction in predictions(held_out(config), chunks, topology, name, samples)
    ]
    answers = {prediction.sample.sample_id: prediction.text for prediction in found}
    return evaluate(config), answers


def run_command(words: list[str]) -> int:
    """The command on every rank of the pool, as torchrun starts it; returns its exit code."""
    with patch.dict(os.environ, torchrun_environment(dist.get_rank(), dist.get_world_size())):
        try:
            main(words)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def one_at_a_time(config: RunConfig) -> Answers:
    """Greedy answers by whole forward passes over one sample at a time; runs on a rank of the pool."""
    topology, (model,) = trained_model(config)
    found = {}
    for name in DATASETS:
        dataset = EvaluationSet(config.data, name, config.evaluation.samples)
        for sample in dataset.questions():
            if sample.task:
                tokens = brute_force(model, topology, prompt_of(sample), dataset.tokenizer)
                found[sample.sample_id] = text_of(tokens, dataset.tokenizer)
    return found


@torch.no_grad()
def brute_force(
    model: Qwen3VL, topology: Topology, prompt: EncodedSample, tokenizer: Tokenizer
) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < MOST_TOKENS and not set(tokens) & set(tokenizer.stop_ids):
        batch, _ = pack_prompts([extend(prompt, tokens)], tokenizer.pad_id)
        tokens.append(int(model.logits(model.prepare(batch))[-1].argmax()))
    return tokens


def text_of(tokens: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode([token for token in tokens if token not in tokenizer.stop_ids])


def by_transformers(config: RunConfig) -> Answers:
    """Answers to one sample of each task by transformers' generate with the same weights."""
    _, (model,) = trained_model(config)
    tokenizer = Tokenizer(config.data.tokenizer)
    theirs = huggingface_model(config.model, tokenizer.special(IMAGE), tokenizer.special(VIDEO))
    theirs.load_state_dict(to_huggingface(model.state_dict(), config.model), strict=False)
    answers, tasks = {}, set()
    for name in DATASETS:
        for sample in EvaluationSet(config.data, name, config.evaluation.samples).questions():
            if sample.task and sample.task not in tasks:
                tasks.add(sample.task)
                answers[sample.sample_id] = text_of(
                    generate(theirs, prompt_of(sample), tokenizer), tokenizer
                )
    return answers


def generate(theirs: Any, prompt: EncodedSample, tokenizer: Tokenizer) -> list[int]:
    ends = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    output = transformers_answer(theirs, prompt, MOST_TOKENS, **ends)
    return output[0, len(prompt.input_ids) :].tolist()


@pytest.fixture(scope="module")
def trained(
    pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Data and folder of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    pool.run(1, train, run_config(demo_data, folder, STEPS, 1, *WORDS))
    return demo_data, folder


@pytest.fixture(scope="module")
def alone(pool: RankPool, trained: tuple[Path, Path]) -> tuple[dict[str, Any], Answers]:
    """What one process finds."""
    (found,) = pool.run(1, evaluate_on_ranks, run_config(*trained, STEPS, 1, *WORDS))
    return found


def test_answers_are_those_of_greedy_decoding(
    alone: tuple[dict[str, Any], Answers], pool: RankPool, trained: tuple[Path, Path]
) -> None:
    (expected,) = pool.run(1, one_at_a_time, run_config(*trained, STEPS, 1, *WORDS))
    assert alone[1] == expected


def test_answers_are_those_of_transformers(
    alone: tuple[dict[str, Any], Answers], pool: RankPool, trained: tuple[Path, Path]
) -> None:
    (expected,) = pool.run(1, by_transformers, run_config(*trained, STEPS, 1, *WORDS))
    assert len(expected) >= 4
    assert {name: alone[1][name] for name in expected} == expected


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.long if name in LONGER else ()) for name in LAYOUTS],
)
def test_a_layout_does_not_change_the_results(
    layout: str, alone: tuple[dict[str, Any], Answers], pool: RankPool, trained: tuple[Path, Path]
) -> None:
    """Reference: one process."""
    world_size, words = LAYOUTS[layout]
    found = pool.run(
        world_size, evaluate_on_ranks, run_config(*trained, STEPS, world_size, *WORDS, *words)
    )
    results = found[0][0]
    assert all(other == results for other, _ in found)
    assert results["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    assert (results["step"], results["tasks"]) == (STEPS, alone[0]["tasks"])
    assert {name: text for _, answers in found for name, text in answers.items()} == alone[1]


def test_the_command_takes_the_newest_or_a_named_checkpoint(
    alone: tuple[dict[str, Any], Answers],
    pool: RankPool,
    trained: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    data, folder = trained
    (checkpoint,) = (folder / "checkpoints").glob("*/step-*")
    elsewhere = run_words(data, tmp_path / "other", STEPS, *WORDS, f"checkpoint={checkpoint}")
    for words, target in (
        (run_words(data, folder, STEPS, *WORDS), folder),
        (elsewhere, tmp_path / "other"),
    ):
        assert pool.run(2, run_command, words) == [0, 0]
        results = json.loads((target / "eval.json").read_text())
        assert results["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
        assert results["tasks"] == alone[0]["tasks"]
        assert (target / "report.html").exists()
        # Each question about a place of a document or film is in a cell of its task's grid.
        assert results["needles"] == alone[0]["needles"]
        for task in ("needle", "video"):
            cells = [cell for row in results["needles"][task].values() for cell in row]
            assert sum(asked for _, asked in cells) == results["tasks"][task]["n"] > 0


def write_user_data(folder: Path) -> None:
    """Five records of a LLaVA file about pictures, converted as a user does: the last has a task."""
    records = []
    for i in range(5):
        PIL.Image.new("RGB", (64, 64), (50 * i, 0, 0)).save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour?"},
            {"from": "gpt", "value": "Red. " * (1 + 5 * i)},
        ]
        records.append(
            {"id": str(i), "image": f"{i}.png", "conversations": turns}
            | ({"task": "colour"} if i == 4 else {})
        )
    for name, some in (("plain", records[:4]), ("named", records[4:])):
        (folder / f"{name}.json").write_text(json.dumps(some))
        assert (
            convert(
                [
                    "convert",
                    "llava",
                    str(folder / f"{name}.json"),
                    str(folder / name),
                    "--images-dir",
                    str(folder),
                ]
            )
            == 0
        )


@pytest.mark.parametrize("name", ["plain", "named"])
def test_converted_user_data_is_evaluated(
    name: str, pool: RankPool, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Without a task there are losses, and a line that says how to name one; with one, answers are compared too."""
    write_user_data(tmp_path)
    data, folder = trained
    (checkpoint,) = (folder / "checkpoints").glob("*/step-*")
    words = run_words(data, tmp_path / "other", STEPS, *WORDS, f"checkpoint={checkpoint}")
    words = [word for word in words if not word.startswith("data.validation")]
    gone = [f"~data.validation.{source}" for source in DATASETS]
    assert pool.run(
        1, run_command, [*words, *gone, f"+data.validation.mine.path={tmp_path / name}"]
    ) == [0]
    results = json.loads((tmp_path / "other" / "eval.json").read_text())
    assert list(results["loss"]) == ["mine"]
    assert {task: result["n"] for task, result in results["tasks"].items()} == (
        {} if name == "plain" else {"colour": 1}
    )
    assert (NO_TASKS in (tmp_path / "other" / "report.html").read_text()) == (name == "plain")


def test_an_empty_table_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    losses, tasks = {"pictures [a]": 1.5}, {"colour": {"accuracy": 0.5, "n": 2}}
    shown = []
    for results in (
        {"loss": losses, "tasks": {}},
        {"loss": losses, "tasks": tasks},
        {"loss": {}, "tasks": {}},
    ):
        print_results(results, Screen(True, 1))
        shown.append(capsys.readouterr().out)
    assert (
        "pictures [a]" in shown[0]
        and "accuracy" not in shown[0]
        and shown[0].endswith(NO_TASKS + "\n")
    )
    assert "50.0%" in shown[1] and NO_TASKS not in shown[1]
    assert shown[2] == NO_TASKS + "\n" and "--task NAME" in NO_TASKS


def take(config: RunConfig, source: str) -> str:
    """What the user is told of a checkpoint that cannot be taken."""
    with pytest.raises(UserError) as caught:
        evaluate(config, source)
    topologies.stop()
    return str(caught.value)


def test_a_checkpoint_that_cannot_be_taken_is_named(
    pool: RankPool, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    data, folder = trained
    (checkpoint,) = (folder / "checkpoints").glob("*/step-*")
    damaged = tmp_path / "damaged" / "checkpoints" / "multimodal" / checkpoint.name
    shutil.copytree(checkpoint, damaged)
    with max(damaged.glob("*.distcp"), key=lambda path: path.stat().st_size).open("r+b") as file:
        file.write(b"damage")
    here = run_config(data, tmp_path, STEPS, 1, *WORDS)
    damaged_run = run_config(data, tmp_path / "damaged", STEPS, 1, *WORDS)
    other_model = run_config(data, folder, STEPS, 1, *WORDS, "model.text.layers=5")
    for config, source, expected in (
        (here, "", "holds no checkpoint: train the run first"),
        (here, str(tmp_path), "is not a checkpoint of this version"),
        (here, str(damaged), f"checkpoint={damaged} is damaged"),
        (damaged_run, "", "only damaged checkpoints"),
        (other_model, "", "holds another model: model.text.layers is 4 there and 5 here"),
    ):
        (told,) = pool.run(1, take, config, source)
        assert expected in told and "\n" not in told


def command_of(folder: Path, program: str) -> str:
    """Return a command line that runs a program in Python."""
    path = folder / "my program.py"
    path.write_text(program)
    return shlex.join([sys.executable, str(path)]) + " {model} {out}"


@pytest.mark.parametrize("start", ["evaluate", "pretrain"])
def test_a_program_evaluates_an_export(
    start: str, pool: RankPool, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    data, folder = trained
    run = tmp_path / "a run"
    shutil.copytree(folder, run)
    more = (*FEW, f"evaluation.command={command_of(tmp_path, PROGRAM)}")
    config = run_config(data, run, STEPS, 1, *more)
    if start == "evaluate":
        assert pool.run(2, run_command, run_words(data, run, STEPS, *more)) == [0, 0]
    else:
        # All steps are done: the run goes on with what comes after them.
        config.run.evaluate_at_end = True
        pool.run(1, train, config)

    tokenizer = Tokenizer(config.data.tokenizer)
    theirs = huggingface_model(config.model, tokenizer.special(IMAGE), tokenizer.special(VIDEO))
    results = json.loads((run / "eval.json").read_text())
    assert results["command"] == {
        "results.toy.acc,none": 0.25,
        "results.toy.<b>deep</b>.numbers": sum(each.numel() for each in theirs.parameters()),
        "results.toy.is_a_rank": 0,
        "score": 3,
    }
    assert list(results["loss"]) == ["text"]
    page = (run / "report.html").read_text()
    assert "results.toy.&lt;b&gt;deep&lt;/b&gt;.numbers" in page and "<b>deep" not in page
    left = {path.name for path in (run / "evaluation").iterdir()}
    assert left == {f"results-step-{STEPS}", f"command-step-{STEPS}.log"}


def test_a_command_that_fails_leaves_the_rest(
    pool: RankPool, trained: tuple[Path, Path], tmp_path: Path
) -> None:
    data, folder = trained
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*")}
    (run / "eval.json").unlink(missing_ok=True)
    program = "print('loading\\n\\x1b[31mno such task'); raise SystemExit(3)"
    words = (*FEW, f"evaluation.command={command_of(tmp_path, program)}")
    (line,) = pool.run(1, take, run_config(data, run, STEPS, 1, *words), "")
    assert line.startswith("evaluation.command ended with exit code 3; its output, ")
    assert line.endswith("ends: loading | \\x1b[31mno such task") and "\n" not in line
    results = json.loads((run / "eval.json").read_text())
    assert list(results["loss"]) == ["text"] and "command" not in results
    assert (run / "report.html").exists()
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.*")} == before
