"""Optimizer and weights in files of a fast disk. Reference: the same runs on Megatron-core's engine, step for step."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from visionloom.common.errors import UserError
from visionloom.parallel.config import ZeroConfig
from visionloom.parallel.on_disk import mapped
from visionloom.tests.debian import install
from visionloom.tests.ranks import RankFailed, RankPool
from visionloom.tests.train.engines.test_zero import agree, stopped_anew, weights_agree
from visionloom.tests.train.faulty import pretrain_with
from visionloom.tests.train.runs import metrics, run_config
from visionloom.tests.train.test_early_end import exact
from visionloom.tests.train.test_layouts import train
from visionloom.train.engines import nvme

STEPS = 6
MODEL = "model.text.ffn_hidden_size=2304"
"""DeepSpeed keeps less than 1 MiB in memory: with this a rank's stretches of a layer's first matrix are larger."""
PLACES = {
    "optimizer": ["offload_optimizer=nvme"],
    "parameters": ["offload_parameters=nvme"],
    "both": ["offload_optimizer=nvme", "offload_parameters=nvme"],
}


def words_of(disk: Path, places: list[str]) -> list[str]:
    words = ["stage=3", "bucket_bytes=4194304", f"nvme_path={disk}", *places]
    return [MODEL, "parallel.engine=deepspeed", *(f"parallel.zero.{word}" for word in words)]


def run(pool: RankPool, data: Path, folder: Path, ranks: int, *words: str) -> Path:
    config = run_config(data, folder, STEPS, ranks, MODEL, *words)
    assert pool.run(ranks, stopped_anew, config, [], 0) == ["done"] * ranks
    return folder


@pytest.fixture(scope="module")
def compiled() -> None:
    """DeepSpeed's asynchronous I/O, once for the machine: five minutes of a core, more than the pool waits for."""
    if not Path("/usr/include/libaio.h").exists() or not all(map(shutil.which, ("g++", "ninja"))):
        install("libaio, a C++ compiler and ninja", "libaio-dev", "g++", "ninja-build")
    code = (
        "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=False)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}
    )


@pytest.fixture(scope="module")
def megatrons(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(pool, demo_data, tmp_path_factory.mktemp("megatron"), 2)


@pytest.mark.disk
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("places", PLACES)
def test_steps_are_megatrons_and_go_on_exactly(
    places: str, megatrons: Path, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    words = words_of(tmp_path / "disk", PLACES[places])
    ours, resumed = run(pool, demo_data, tmp_path / "ours", 2, *words), tmp_path / "resumed"
    agree(ours, megatrons)
    weights_agree(pool, ours, megatrons)
    config = run_config(demo_data, resumed, STEPS, 2, *words)
    assert pool.run(2, stopped_anew, config, [1], 2)[0].startswith("stopped by SIGTERM")
    pool.run(2, train, config)
    assert exact(resumed) == exact(ours)
    weights_agree(pool, resumed, ours, 0.0)


@pytest.mark.disk
@pytest.mark.usefixtures("compiled")
def test_three_ranks_and_evaluations(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    """Stretches begin at odd places, and ranks evaluate unequal numbers of samples."""
    larger = MODEL.replace("2304", "4600")
    words = ["phases.multimodal.global_batch=6", "evaluation.phase_samples=4", larger]
    theirs = run(pool, demo_data, tmp_path / "theirs", 3, *words)
    words = [*words_of(tmp_path / "disk", PLACES["both"]), *words]
    ours = run(pool, demo_data, tmp_path / "ours", 3, *words)
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)
    for own, other in zip(held_out_losses(ours), held_out_losses(theirs), strict=True):
        assert own == pytest.approx(other, rel=1e-5)


def held_out_losses(folder: Path) -> list[dict[str, float]]:
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "validation"]


@pytest.mark.disk
@pytest.mark.usefixtures("compiled")
def test_bf16_is_that_of_host_memory(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    """Bit for bit; the reference is DeepSpeed's own offload to the host."""
    both: dict[str, Path] = {}
    for place in ("cpu", "nvme"):
        places = [f"offload_optimizer={place}", f"offload_parameters={place}"]
        # Weights of two bytes: twice as many make 1 MiB.
        words = [*words_of(tmp_path / "disk", places), MODEL.replace("2304", "4608")]
        both[place] = run(pool, demo_data, tmp_path / place, 2, *words, "run.precision=bf16")
    losses = [[line[:3] for line in exact(each)] for each in both.values()]
    assert losses[0] == losses[1]
    weights_agree(pool, *both.values(), 0.0)


@pytest.mark.disk
@pytest.mark.usefixtures("compiled")
def test_adapters(megatrons: Path, pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    """Frozen weights on disk, which are in no checkpoint of the run, under adapters in memory."""
    (base,) = (megatrons / "checkpoints" / "multimodal").iterdir()
    words = [f"init.checkpoint={base}", "lora.rank=4", "lora.groups=[language]"]
    theirs = run(pool, demo_data, tmp_path / "theirs", 2, *words)
    words += words_of(tmp_path / "disk", PLACES["both"])
    ours = run(pool, demo_data, tmp_path / "ours", 2, *words)
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)


@pytest.mark.disk
@pytest.mark.usefixtures("compiled")
def test_from_megatron_and_back(
    megatrons: Path, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    words = words_of(tmp_path / "disk", PLACES["both"])
    for ours, step in (([MODEL], 2), (words, 4), ([MODEL], 0)):
        config = run_config(demo_data, tmp_path / "run", STEPS, 2, *ours)
        pool.run(2, stopped_anew, config, [0] if step else [], step)
    agree(tmp_path / "run", megatrons)
    weights_agree(pool, tmp_path / "run", megatrons)


@pytest.mark.disk
@pytest.mark.usefixtures("compiled")
def test_a_bad_step_changes_nothing(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    words = words_of(tmp_path / "disk", PLACES["both"])
    for name, more in (("ours", words), ("theirs", [MODEL])):
        config = run_config(demo_data, tmp_path / name, STEPS, 2, *more)
        pool.run(2, pretrain_with, config, "nan", 3, 3, 1)
    skipped = [line["skipped"] for line in metrics(tmp_path / "ours")]
    assert skipped == [False, False, True, False, False, False]
    weights_agree(pool, tmp_path / "ours", tmp_path / "theirs")


def bytes_on_disk(data: Path, folder: Path, words: list[str]) -> tuple[int, int, int]:
    """Bytes of this rank's files, of the matrices that are in them alone, and of files that a closed engine leaves (runs in the pool)."""
    from visionloom.parallel import topology as topologies
    from visionloom.parallel.on_disk import is_on_disk
    from visionloom.train import build

    config = run_config(data, folder, STEPS, 2, *words)
    topology = build.open_topology(config)
    stream = build.build_stream(config, "multimodal", folder, topology)
    with build.as_the_engine_wants(config, "multimodal", topology):
        parts = build.build_model(config, topology, drawn=True)
    trainer = build.build_trainer(config, "multimodal", topology, parts, stream)
    owned = {id(each.parameter): each for each in trainer.engine.owned()}
    expected = 0
    for parameter in filter(is_on_disk, parts[0].parameters()):
        assert parameter.ds_tensor.numel() == 1  # a placeholder
        expected += sum(values.nbytes for values in owned[id(parameter)].values.values())

    def size() -> int:
        files = nvme.folder_of(config.parallel.zero).rglob("*.swp")
        return sum(each.stat().st_size for each in files)

    held = size()
    trainer.engine.close()
    left = size()
    topologies.stop()
    return held, expected, left


@pytest.mark.disk
@pytest.mark.usefixtures("compiled")
def test_what_is_on_disk(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    words = words_of(tmp_path / "disk", PLACES["both"])
    for held, expected, left in pool.run(2, bytes_on_disk, demo_data, tmp_path / "run", words):
        # Four layers' first matrices, gate and up: weight, master weight and moments of four bytes.
        assert expected == 4 * (2 * 2304 * 128 // 2) * 16
        # Smaller matrices are in the same groups of the optimizer.
        assert held > expected
        assert not left
    assert len(list((tmp_path / "disk").iterdir())) == 2


@pytest.mark.disk
@pytest.mark.usefixtures("compiled")
def test_a_weight_larger_than_a_buffer(pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    words = words_of(tmp_path / "disk", PLACES["both"])
    words.append("parallel.zero.bucket_bytes=1048576")
    with pytest.raises(
        RankFailed, match=r"UserError: parallel.zero.bucket_bytes=1048576 is less than .*294912"
    ):
        run(pool, demo_data, tmp_path / "run", 2, *words)


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    claim = nvme.claim.__wrapped__
    (first, lock), (second, _) = claim(tmp_path), claim(tmp_path)
    assert first != second
    (first / "zero_stage_3").mkdir()
    lock.close()
    # What a killed process has left goes.
    assert claim(tmp_path)[0] == first
    assert [each.name for each in first.iterdir()] == ["lock"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"parallel.zero.nvme_path=.*: name another folder"):
        claim(tmp_path / "file")


def test_numbers_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(torch.arange(4.0).numpy().tobytes())
    mapped(str(path), 4, torch.float32)[1:3] += 10
    assert torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).tolist() == [
        0,
        11,
        12,
        3,
    ]
    with pytest.raises(UserError, match="was not written whole: make room"):
        mapped(str(path), 5, torch.float32)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("is_compatible", lambda self, verbose: False, "apt-get install .*libaio-dev.*or choose cpu"),
        ("load", None, "could not be compiled with .*libaio-dev.*: Error building; or choose cpu"),
    ],
)  # fmt: skip
def test_without_libaio_the_package_is_named(
    name: str, value: Any, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from visionloom.train.engines.zero import import_deepspeed

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error building\nextension 'async_io'")

    import_deepspeed(torch.device("cpu"))
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: True)
    monkeypatch.setattr(AsyncIOBuilder, name, value or fail)
    monkeypatch.setattr(nvme, "first_fault", str)
    zero = ZeroConfig(offload_optimizer="nvme", nvme_path=str(tmp_path))
    with pytest.raises(UserError, match=f"parallel.zero.offload_optimizer=nvme: .*{said}"):
        nvme.disk_settings(zero, torch.float32)


# The child calls the one function and ends: no other thread's lock is met.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_memory_that_cannot_be_locked() -> None:
    """In a process without root's rights, of which Linux itself refuses it."""
    child = os.fork()
    if not child:
        said = ""
        try:
            if not os.getuid():
                os.setuid(65534)
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
            nvme.check_locking(1 << 10)
            nvme.check_locking(1 << 20)
        except UserError as error:
            said = str(error)
        finally:
            os._exit(0 if "`ulimit -l unlimited`" in said else 1)
    assert os.waitpid(child, 0)[1] == 0
