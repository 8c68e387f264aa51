"""Weights from the Hugging Face world into every layout and back, bit for bit.

References: folders that transformers' save_pretrained writes, its from_pretrained, its logits and its loss.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from visionloom.common.errors import UserError
from visionloom.data.encode.tokenizer import IMAGE, VIDEO, Tokenizer
from visionloom.data.stream.batch import widen
from visionloom.launch.convert import main
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.folder import HuggingFaceFolder
from visionloom.model.huggingface.names import from_huggingface
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.sharding import canonical_parameters, cut
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.share import ALONE
from visionloom.tests.model.huggingface.test_folder import model, save
from visionloom.tests.model.reference import (
    huggingface_model,
    make_example,
    make_pack,
    reference_run,
)
from visionloom.tests.ranks import RankPool, torchrun_environment
from visionloom.tests.train.runs import metrics, run_config
from visionloom.tests.train.test_layouts import train
from visionloom.train.agreements import check_run
from visionloom.train.build import build_stream
from visionloom.train.checkpoint import read as checkpoint
from visionloom.train.checkpoint.stored import StoredWeights
from visionloom.train.config import RunConfig
from visionloom.train.exchange.import_huggingface import StreamedPlanner, import_huggingface
from visionloom.train.weights.load_huggingface import load_huggingface

DENSE, TIED, MIXTURE = model(), model(tied=True), model(False, 4)
KINDS = {"dense": DENSE, "tied": TIED, "mixture": MIXTURE}
STEPS = 4
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("dense", 2, {"tensor": 2}),
    ("tied", 2, {"tensor": 2}),
    ("tied", 2, {"pipeline": 2}),
    ("dense", 2, {"pipeline": 2, "virtual_pipeline": 2}),
    ("dense", 2, {"context": 2}),
    ("dense", 2, {}),
    ("mixture", 2, {"expert": 2}),
    ("mixture", 2, {"pipeline": 2}),
    ("mixture", 2, {"tensor": 2, "expert_tensor": 2}),
    ("mixture", 2, {"tensor": 2, "expert": 2}),
]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the safetensors package."""
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def convert(words: list[str]) -> int:
    """The command on every rank of the pool, as torchrun starts it; returns its exit code."""
    dist.barrier()
    with patch.dict(os.environ, torchrun_environment(dist.get_rank(), dist.get_world_size())):
        try:
            return main(words)
        except SystemExit as stop:
            return int(stop.code or 0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder of each kind of model, as transformers writes it in bf16."""
    made = {name: tmp_path_factory.mktemp(name) for name in KINDS}
    for name, folder in made.items():
        save(folder, KINDS[name])
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "modeling_evil.py").write_text("raise SystemExit")
    yield made


def as_published(folder: Path, out: Path) -> Path:
    """A folder with its experts as the hub has them."""
    out.mkdir()
    state = {
        k: v.transpose(1, 2).contiguous() if ".mlp.experts." in k else v
        for k, v in tensors_of(folder).items()
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    for path in folder.iterdir():
        if not path.name.startswith("model"):
            (out / path.name).write_bytes(path.read_bytes())
    return out


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [("dense", 1, {}), ("mixture", 1, {}), *LAYOUTS[:3], *LAYOUTS[5:8]],
    ids=str,
)
def test_there_and_back_is_bit_identical(
    kind: str,
    ranks: int,
    layout: dict[str, int],
    folders: dict[str, Path],
    pool: RankPool,
    tmp_path: Path,
) -> None:
    """Import in a layout, export again: every tensor and type as it was, experts as published, and transformers loads it."""
    stored, out = tmp_path / "stored", tmp_path / "out"
    words = [f"parallel.{axis}={degree}" for axis, degree in layout.items()]
    assert set(
        pool.run(ranks, convert, ["import", f"hf={folders[kind]}", f"out={stored}", *words])
    ) == {0}
    assert set(
        pool.run(ranks, convert, ["export", f"checkpoint={stored}", f"out={out}", "shard=0.3MB"])
    ) == {0}
    published = as_published(folders[kind], tmp_path / "published")
    assert_same_bits(tensors_of(out), tensors_of(published))
    assert len(list(out.glob("*.safetensors"))) > 2
    assert sorted(p.name for p in out.iterdir() if "safetensors" not in p.name) == [
        "chat_template.jinja", "config.json", "generation_config.json",
    ]  # fmt: skip
    theirs, info = AutoModelForImageTextToText.from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    before = AutoModelForImageTextToText.from_pretrained(folders[kind], dtype="auto")
    assert_same_bits(theirs.state_dict(), before.state_dict())
    kept = [json.loads((folder / "config.json").read_text()) for folder in (out, folders[kind])]
    assert kept[0]["image_token_id"] == kept[1]["image_token_id"] and kept[0]["dtype"] == "bfloat16"


def test_the_published_layout_goes_there_and_back(
    folders: dict[str, Path], pool: RankPool, tmp_path: Path
) -> None:
    hub, stored, out = (
        as_published(folders["mixture"], tmp_path / "hub"),
        tmp_path / "stored",
        tmp_path / "out",
    )
    assert set(
        pool.run(2, convert, ["import", f"hf={hub}", f"out={stored}", "parallel.expert=2"])
    ) == {0}
    assert pool.run(
        1, convert, ["export", f"checkpoint={stored}", f"out={out}", "layout=transformers"]
    ) == [0]
    assert_same_bits(tensors_of(out), tensors_of(folders["mixture"]))
    again = tmp_path / "again"
    assert pool.run(1, convert, ["export", f"checkpoint={stored}", f"out={again}"]) == [0]
    assert_same_bits(tensors_of(again), tensors_of(hub))
    theirs, info = AutoModelForImageTextToText.from_pretrained(
        again, dtype="auto", output_loading_info=True
    )
    assert not any(info.values())
    before = AutoModelForImageTextToText.from_pretrained(folders["mixture"], dtype="auto")
    assert_same_bits(theirs.state_dict(), before.state_dict())


def held(folder: Path, config: ModelConfig, layout: dict[str, Any]) -> tuple[int, int, list[str]]:
    """Bytes this rank read and bytes it holds, and parameters that are not transformers' own; runs on every rank."""
    topology = topologies.start(ParallelConfig(**layout), torch.device("cpu"))
    numbers = topology.config.chunk_numbers
    chunks = [Qwen3VL(config, topology, torch.bfloat16, number) for number in numbers]
    taken, read = [0], HuggingFaceFolder.read

    def counted(self: HuggingFaceFolder, name: str, region: Any) -> Tensor:
        part = read(self, name, region)
        taken[0] += part.nbytes
        return part

    with patch.object(HuggingFaceFolder, "read", counted):
        load_huggingface(folder, chunks, config, topology)
    expected = from_huggingface(tensors_of(folder), config)
    named = [pair for chunk in chunks for pair in canonical_parameters(chunk)]
    wrong = [
        name
        for name, parameter in named
        if not torch.equal(parameter, cut(name, expected[name], parameter, topology))
    ]
    return taken[0], sum(parameter.nbytes for _, parameter in named), wrong


@pytest.mark.parametrize(("kind", "ranks", "layout"), LAYOUTS, ids=str)
def test_every_rank_reads_its_own_part_and_no_more(
    kind: str, ranks: int, layout: dict[str, Any], folders: dict[str, Path], pool: RankPool
) -> None:
    for taken, holds, wrong in pool.run(ranks, held, folders[kind], KINDS[kind], layout):
        assert wrong == []
        assert taken == holds


def largest_read(folder: Path, out: Path) -> tuple[int, int]:
    """Most bytes of tensors that an import holds at once, and the bytes of all; runs on a rank of the pool."""
    topology = topologies.start(ParallelConfig(), torch.device("cpu"))
    resolve, alive, most, total = StreamedPlanner.resolve_data, list[Tensor](), 0, 0

    def counted(self: Any, item: Any) -> Any:
        nonlocal most, total
        part = resolve(self, item)
        if isinstance(part, Tensor):
            alive.append(part)
            total += part.nbytes
            most = max(most, sum(tensor.untyped_storage().nbytes() for tensor in alive))
        return part

    with patch.object(StreamedPlanner, "resolve_data", counted):
        import_huggingface(folder, out, topology, lambda _: None)
    return most, total


def test_an_import_holds_one_part_at_a_time(
    folders: dict[str, Path], pool: RankPool, tmp_path: Path
) -> None:
    """Torch's writer keeps a tensor of every name; what is kept is empty by then. The largest part here is a layer's experts."""
    ((most, total),) = pool.run(1, largest_read, folders["mixture"], tmp_path / "out")
    largest = max(tensor.nbytes for tensor in tensors_of(folders["mixture"]).values())
    assert most == largest < total / 5


def our_logits(folder: Path, config: ModelConfig, pack: Any) -> Tensor:
    """Logits of a checkpoint's model in fp32; runs on a rank of the pool."""
    topology = topologies.start(ParallelConfig(), torch.device("cpu"))
    ours = Qwen3VL(config, topology)
    checkpoint.load_weights(checkpoint.read(folder), [ours], topology)
    with torch.no_grad():
        return ours.logits(ours.prepare(pack))


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_model_gives_the_same_logits(
    kind: str, folders: dict[str, Path], pool: RankPool, tmp_path: Path
) -> None:
    """Reference: transformers with what it loads from the exported folder, in fp32."""
    stored, out = tmp_path / "stored", tmp_path / "out"
    assert pool.run(1, convert, ["import", f"hf={folders[kind]}", f"out={stored}"]) == [0]
    assert pool.run(1, convert, ["export", f"checkpoint={stored}", f"out={out}", "dtype=fp32"]) == [
        0
    ]
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.float32}
    theirs = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    example = make_example([6, (4, 6), 5, (2, 4, 4), 7], seed=3)
    (found,) = pool.run(1, our_logits, stored, KINDS[kind], make_pack(theirs, [example]))
    with torch.no_grad():
        (expected,), _ = reference_run(theirs, [example])
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def first_loss(config: RunConfig, folder: Path) -> float:
    """Loss of the first global batch by transformers, a sample at a time; runs on a rank of the pool."""
    topology = topologies.start(ParallelConfig(), torch.device("cpu"))
    phase, tokenizer = config.phases["multimodal"], Tokenizer(config.data.tokenizer)
    stream = build_stream(config, "multimodal", folder, topology)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    loss, weight = torch.zeros(()), torch.zeros(())
    for pack in stream.micro_batches(0, ALONE, phase.micro_batch):
        pixels = torch.from_numpy(widen(pack.patches.numpy(), 1536)).float() / 127.5 - 1
        grids, at, rows = pack.grid_thw.long(), 0, 0
        for begin, end in zip(
            pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True
        ):
            kinds = (pack.input_ids[begin:end] == tokenizer.special(IMAGE)).int()
            first, start = at, rows
            while int(kinds.sum()) * 4 > rows - start:
                rows, at = rows + int(grids[at].prod()), at + 1
            images = (
                {"pixel_values": pixels[start:rows], "image_grid_thw": grids[first:at]}
                if at > first
                else {}
            )
            with torch.no_grad():
                logits = theirs(
                    input_ids=pack.input_ids[None, begin:end], mm_token_type_ids=kinds[None], use_cache=False, **images,
                ).logits[0]  # fmt: skip
            losses = F.cross_entropy(logits, pack.labels[begin:end], reduction="none")
            loss = loss + (losses * pack.loss_weights[begin:end]).sum()
            weight = weight + pack.loss_weights[begin:end].sum()
    return float(loss / weight)


RUNS: dict[str, list[tuple[int, list[str]]]] = {
    "tiny": [(1, []), (2, ["parallel.tensor=2"])],
    "tiny_moe": [(2, ["parallel.expert=2"])],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_begins_with_the_loss_of_transformers(
    name: str, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """init.huggingface in a real run, on one rank and on two in other layouts; what came along is exported again."""
    tokenizer = Tokenizer(str(demo_data / "tokenizer"))
    folder, words = tmp_path / "hf", [f"model={name}", f"init.huggingface={tmp_path / 'hf'}"]
    words += [
        f"phases.multimodal.mixture.{unused}=0" for unused in ("grounding", "interleaved", "video")
    ]
    config = run_config(demo_data, tmp_path, STEPS, 1, *words)
    torch.manual_seed(5)
    theirs = huggingface_model(config.model, tokenizer.special(IMAGE), tokenizer.special(VIDEO))
    theirs.save_pretrained(folder)
    shutil.copyfile(demo_data / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
    (expected,) = pool.run(1, first_loss, config, folder)
    for number, (ranks, more) in enumerate(RUNS[name]):
        run = tmp_path / f"run-{number}"
        pool.run(ranks, train, run_config(demo_data, run, STEPS, ranks, *words, *more))
        assert metrics(run)[0]["loss"] == pytest.approx(expected, abs=1e-5)
    (stored,) = (run / "checkpoints" / "multimodal").glob("step-*")
    assert pool.run(1, convert, ["export", f"checkpoint={stored}", f"out={tmp_path / 'out'}"]) == [
        0
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
    info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)[
        1
    ]
    assert not any(info.values())


def test_a_run_on_another_model_is_refused_before_torch(
    demo_data: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        check_run(run_config(demo_data, tmp_path, STEPS, 1, f"init.huggingface={folders['dense']}"))
    first, *_ = str(caught.value).splitlines()
    assert (
        first
        == f"model.text.hidden_size=128, but {folders['dense']}/config.json says 64: set it alike"
    )


def test_an_imported_folder_starts_a_run(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    """init.checkpoint with an imported folder begins as init.huggingface with the folder it was made of."""
    config = run_config(demo_data, tmp_path, STEPS, 1)
    reference = huggingface_model(config.model)
    reference.save_pretrained(tmp_path / "hf")
    assert pool.run(
        1, convert, ["import", f"hf={tmp_path / 'hf'}", f"out={tmp_path / 'stored'}"]
    ) == [0]
    losses = []
    for name, source in (
        ("a", f"init.huggingface={tmp_path / 'hf'}"),
        ("b", f"init.checkpoint={tmp_path / 'stored'}"),
    ):
        pool.run(1, train, run_config(demo_data, tmp_path / name, STEPS, 1, source))
        losses.append(metrics(tmp_path / name)[0]["loss"])
        assert (tmp_path / name / "huggingface" / "config.json").is_file()
    assert losses[0] == losses[1]


def test_a_rest_of_a_failed_import_is_no_checkpoint(
    folders: dict[str, Path], pool: RankPool, tmp_path: Path
) -> None:
    assert pool.run(1, convert, ["import", f"hf={folders['dense']}", f"out={tmp_path / 'a'}"]) == [
        0
    ]
    assert pool.run(1, convert, ["import", f"hf={folders['dense']}", f"out={tmp_path / 'a'}"]) == [
        2
    ]
    victim = next((tmp_path / "a").glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert pool.run(
        1, convert, ["export", f"checkpoint={tmp_path / 'a'}", f"out={tmp_path / 'b'}"]
    ) == [2]
    assert not (tmp_path / "b").exists()


def refused_import(folder: Path, out: Path) -> str:
    """What an import says; runs on a rank of the pool."""
    topology = topologies.start(ParallelConfig(), torch.device("cpu"))
    with pytest.raises(UserError) as caught:
        import_huggingface(folder, out, topology, lambda _: None)
    return str(caught.value)


def test_what_an_import_finds_late_is_one_line(
    folders: dict[str, Path], pool: RankPool, tmp_path: Path
) -> None:
    """A tied head that is no copy is seen while the checkpoint is written, inside torch's own error."""
    hf = tmp_path / "hf"
    hf.mkdir()
    state = tensors_of(folders["tied"])
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"] + 1
    save_file(state, hf / "model.safetensors")
    shutil.copyfile(folders["tied"] / "config.json", hf / "config.json")
    (told,) = pool.run(1, refused_import, hf, tmp_path / "a")
    assert told.startswith(f"hf={hf}: lm_head.weight is not ") and "\n" not in told
    assert not (tmp_path / "a").exists()


def test_stored_parameters_are_found_by_their_names(
    folders: dict[str, Path], pool: RankPool, tmp_path: Path
) -> None:
    assert pool.run(
        1, convert, ["import", f"hf={folders['mixture']}", f"out={tmp_path / 'a'}"]
    ) == [0]
    stored, expected = (
        StoredWeights(tmp_path / "a"),
        from_huggingface(tensors_of(folders["mixture"]), MIXTURE),
    )
    for name, full in expected.items():
        assert stored.entry(name) == (tuple(full.shape), torch.bfloat16) and torch.equal(
            stored.parameter(name), full
        ), name
    assert stored.entry("language_model.decoder.layers.4.input_layernorm.weight") is None
