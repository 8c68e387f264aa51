"""What a stranger may write into a checkpoint, and what becomes of it: an error of one line, and nothing run, read or allocated.

References: torch's own writer of checkpoints, Python's pickle, and what torch's reader does with the same files.
"""

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from visionloom.common.errors import UserError
from visionloom.parallel.topology import Topology
from visionloom.tests.train.strangers import TENSORS, list_files, write_checkpoint
from visionloom.train.checkpoint import read as checkpoint
from visionloom.train.checkpoint.index import INDEX, KNOWN, IndexFault, entries, read_index
from visionloom.train.checkpoint.pickled import Name, PickledObject, read_pickle
from visionloom.train.checkpoint.state_file import STATE, read_run_state
from visionloom.train.checkpoint.stored import StoredWeights
from visionloom.train.checkpoint.untrusted import harmless_reading

SHARD = "__0_0.distcp"
Edit = Callable[[Any], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-00000004")


def fault(folder: Path) -> str:
    """What verifying finds."""
    return checkpoint.fault_in_share(folder, 0, 1) or ""


def test_a_whole_checkpoint_is_read(folder: Path) -> None:
    """The control; reference: the tensors that torch was given."""
    assert fault(folder) == ""
    assert read_index(folder).files == {SHARD}
    weights = StoredWeights(folder)
    for name, tensor in TENSORS.items():
        assert torch.equal(weights.parameter(name), tensor) and weights.entry(name) == (
            tuple(tensor.shape),
            tensor.dtype,
        )


# ---- manifest and files


def rewrite(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_manifest_without_files_is_no_whole_checkpoint(folder: Path) -> None:
    rewrite(folder, "manifest.json", {})
    assert fault(folder) == f"manifest.json does not list {INDEX}"


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"a": 1}',
        '{"a": {"bytes": "1", "xxh3_128": ""}}',
        '{"a": {"bytes": -1, "xxh3_128": ""}}',
    ],
)
def test_a_manifest_of_another_form_is_named(content: str, folder: Path) -> None:
    rewrite(folder, "manifest.json", content)
    assert fault(folder).startswith(
        f"no readable manifest.json ({folder}/manifest.json: "
    ) and "\n" not in fault(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link", "pipe", "sub"])
def test_a_manifest_names_regular_files_inside(name: str, folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    entry = {"bytes": 1, "xxh3_128": checkpoint.hash_file(folder.parent / "secret")}
    (folder / "link").symlink_to(folder.parent / "secret")
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    listed = json.loads((folder / "manifest.json").read_text())
    rewrite(folder, "manifest.json", {name: entry, **listed})
    assert re.match(rf"{name} (leads out|is a link out|is a pipe|is a folder)", fault(folder))


@pytest.mark.parametrize("name", ["common.pt", "__9_0.distcp", "sub/more.bin", "huggingface2"])
def test_no_file_lies_there_unlisted(name: str, folder: Path) -> None:
    """Row 25 of the fault matrix, a sidecar that Megatron-core would unpickle; and any other file."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert fault(folder) == f"{name} is there, and manifest.json does not list it"
    if "/" not in name:
        list_files(folder)
        assert fault(folder) == f"{name} is listed by manifest.json alone"


def test_a_folder_that_is_a_link_is_no_part_of_a_checkpoint(folder: Path) -> None:
    (folder / "huggingface").symlink_to(folder.parent)
    assert "huggingface" in fault(folder)


def test_what_goes_along_with_an_older_import_may_be_unlisted(folder: Path) -> None:
    (folder / "huggingface").mkdir()
    (folder / "huggingface" / "config.json").write_text("{}")
    assert fault(folder) == ""


@pytest.mark.parametrize("state", ["[]", "{}", '{"step": "six"}', "\xff", ""])
def test_a_state_of_another_form_is_damage(folder: Path, state: str) -> None:
    """Though its hash is right: a run passes over such a checkpoint as over any damaged one."""
    (folder / "state.json").write_text(state)
    list_files(folder)
    assert "state.json cannot be used" in fault(folder)


def test_names_are_shown_without_what_a_terminal_obeys(folder: Path) -> None:
    (folder / "\x1b[2Jevil\n").write_bytes(b"")
    assert fault(folder).startswith("\\x1b[2Jevil\\n is there")


# ---- the index: content


def edit(folder: Path, change: Edit) -> str:
    """What is wrong with an index that was changed, with torch's classes, and listed anew."""
    index = pickle.loads((folder / INDEX).read_bytes())
    change(index)
    (folder / INDEX).write_bytes(pickle.dumps(index))
    list_files(folder)
    with pytest.raises(IndexFault) as raised:
        read_index(folder)
    assert fault(folder) == f".metadata or metadata.json cannot be used: {raised.value}"
    with pytest.raises(UserError, match="is not read"):
        StoredWeights(folder)
    return str(raised.value)


def place(index: Any, name: str = "a") -> Any:
    return next(info for key, info in index.storage_data.items() if key.fqn == name)


EDITS: dict[str, tuple[Edit, str]] = {
    "outside": (lambda i: setattr(place(i), "relative_path", "../secret"), "no file of the folder"),
    "absolute": (lambda i: setattr(place(i), "relative_path", "/etc/passwd"), "no file of the folder"),
    "itself": (lambda i: setattr(place(i), "relative_path", INDEX), "no file of the folder"),
    "no text": (lambda i: setattr(place(i), "relative_path", 7), "no file of the folder"),
    "behind the end": (lambda i: setattr(place(i), "offset", 1 << 40), f"a lies outside of {SHARD}"),
    "before the start": (lambda i: setattr(place(i), "offset", -1), f"a lies outside of {SHARD}"),
    "long": (lambda i: setattr(place(i), "length", 1 << 60), f"a lies outside of {SHARD}"),
    "too short": (lambda i: setattr(place(i), "length", 8), "a at (0, 0) is larger than its place"),
    "no number": (lambda i: setattr(place(i), "offset", 0.5), f"a lies outside of {SHARD}"),
    "shared": (lambda i: setattr(place(i, "b"), "offset", place(i).offset), "lie in the same place"),
    "packed": (lambda i: setattr(place(i), "transform_descriptors", ["zstd"]), "packed in a way that is not read"),
    "missing place": (lambda i: i.storage_data.pop(MetadataIndex("a", (0, 0))), "a at (0, 0) was planned but not written"),
    "another place": (
        lambda i: i.storage_data.update({MetadataIndex("c"): _StorageInfo(SHARD, 0, 1)}), "c has a place and is no part"
    ),
    "huge": (lambda i: setattr(i.state_dict_metadata["a"], "size", torch.Size([1 << 40, 6])), "the parts of a do not make it up"),
    "huge and whole": (
        lambda i: (
            setattr(i.state_dict_metadata["a"], "size", torch.Size([1 << 40, 6])),
            setattr(i.state_dict_metadata["a"].chunks[0], "sizes", torch.Size([1 << 40, 6])),
        ),
        "a at (0, 0) is larger than its place",
    ),
    "part outside": (
        lambda i: setattr(i.state_dict_metadata["a"].chunks[0], "offsets", torch.Size([1, 0])), "a part of a lies outside of it"
    ),
    "negative": (lambda i: setattr(i.state_dict_metadata["a"], "size", torch.Size([-4, -6])), "size or place that no tensor has"),
    "many dims": (lambda i: setattr(i.state_dict_metadata["a"], "size", torch.Size([1] * 99)), "size or place that no tensor has"),
    "parts that overlap": (
        lambda i: setattr(
            i.state_dict_metadata["a"], "chunks",
            [ChunkStorageMetadata(torch.Size(at), torch.Size([2, 6])) for at in ([0, 0], [1, 0])],
        ),
        "parts of a overlap",
    ),
    "type": (lambda i: setattr(i.state_dict_metadata["a"].properties, "dtype", torch.complex64), "torch.complex64"),
    "no list": (lambda i: setattr(i.state_dict_metadata["a"], "chunks", {}), "a is of another form"),
    "no tensor": (lambda i: i.state_dict_metadata.update(a="b"), "a is of another form"),
    "no names": (lambda i: setattr(i, "state_dict_metadata", [1]), "state_dict_metadata is of another form"),
    "no places": (lambda i: setattr(i, "storage_data", None), "storage_data is of another form"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_index_agrees_with_the_files_and_with_itself(name: str, folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    change, told = EDITS[name]
    assert told in edit(folder, change)


def test_parts_of_a_tensor_may_form_no_grid(tmp_path: Path) -> None:
    """Five boxes around a centre, as no grid cuts them."""
    from visionloom.train.checkpoint.index import Tiles

    boxes = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in boxes]
    Tiles.of("a", chunks).check([3, 3])
    elsewhere = ChunkStorageMetadata(torch.Size([0, 1]), torch.Size([1, 1]))
    with pytest.raises(IndexFault, match="overlap"):
        Tiles.of("a", [*chunks[:-1], elsewhere]).check([3, 3])


def test_an_index_is_small_beside_what_it_describes(folder: Path) -> None:
    with (folder / INDEX).open("ab") as file:
        file.truncate(1 << 33)  # 8 GiB of nothing
    with pytest.raises(IndexFault, match="larger than"):
        read_index(folder)


# ---- the index: the pickle

METADATA = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
PICKLES: dict[str, tuple[bytes, str]] = {
    "call": (b"cposix\nsystem\n(S'x'\ntR.", "posix.system, which no checkpoint needs"),
    "getattr": (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
    "dotted": (b"ctorch\nSize.numel\n.", "torch.Size.numel"),
    "attribute of a class": (
        METADATA + b"N}U\x01xK\x01s\x86b.",
        "more than plain data",
    ),  # U: SHORT_BINSTRING
    "attributes of a class": (
        METADATA + b"}X\x01\x00\x00\x00xK\x01sb.",
        "attributes of what is no new object",
    ),
    "slots of a class": (
        METADATA + b"N}X\x01\x00\x00\x00xK\x01s\x86b.",
        "attributes of what is no new object",
    ),
    "state twice": (METADATA + b")\x81}b}b.", "attributes of what is no new object"),
    "attributes of a list": (b"]}b.", "attributes of what is no new object"),
    "extension": (b"\x82\x01.", "more than plain data"),
    "persistent": (b"Pabc\n.", "more than plain data"),
    "instance": (b"(iposix\nsystem\n.", "more than plain data"),
    "buffer": (b"\x80\x05\x97.", "more than plain data"),
    "bytes of any size": (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x0f.", "more than plain data"),
    "a place in the memo": (b"Nr\xff\xff\xff\x7f.", ""),
    "digits": (b"L" + b"9" * 5000 + b"L\n.", "more than plain data"),
    "frame of any size": (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x0f.", "no pickle"),
    "deep key": (b"}" + b")" + b"\x85" * 300_000 + b"Ns.", "no dict of names"),
    "calls a list": (b"])R.", "an object of no class"),
    "nothing": (b"", "no pickle"),
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_makes_records_and_nothing_else(name: str) -> None:
    """Row 25 of the fault matrix, `.metadata`. The memo's place costs Python's reader in C 64 GiB."""
    content, told = PICKLES[name]
    if told:
        with pytest.raises(pickle.UnpicklingError, match=re.escape(told)):
            read_pickle(content, KNOWN)
    else:
        assert read_pickle(content, KNOWN) is None


def test_what_is_named_stays_a_name() -> None:
    found = read_pickle(pickle.dumps([torch.Size([2, 3]), torch.float32, {"x": 1.5}], 4), KNOWN)
    size, dtype, plain = found
    assert isinstance(size, PickledObject) and (size.name, size.arguments) == (
        "torch.Size",
        ((2, 3),),
    )
    assert dtype == "torch.float32" and isinstance(dtype, Name) and plain == {"x": 1.5}


# ---- entries


def swap_entry(folder: Path, name: str, content: bytes) -> None:
    """Another entry of torch.save behind the others, as the index says."""
    shard = folder / SHARD
    index = pickle.loads((folder / INDEX).read_bytes())
    place(index, name).offset, place(index, name).length = shard.stat().st_size, len(content)
    shard.write_bytes(shard.read_bytes() + content)
    (folder / INDEX).write_bytes(pickle.dumps(index))
    list_files(folder)


def saved(value: Any, packed: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    if not packed:
        return file.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return out.getvalue()


def nested(depth: int) -> Any:
    found: Any = 0
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (saved(torch.zeros(1 << 20), packed=True) + b"", "an entry is packed"),
        (b"x" * 200, "no archive of torch.save"),
        (saved({str(i): i for i in range(5000)}), "bytes beside its numbers"),
        (saved(torch.zeros(3, 3)), "is not read"),
        (saved(["no tensor", "x" * 200]), "is not read"),
    ],
    ids=["packed", "no archive", "much beside", "another shape", "no tensor"],
)
def test_an_entry_is_what_the_index_says(content: bytes, told: str, folder: Path) -> None:
    swap_entry(folder, "a", content)
    with pytest.raises(UserError, match=told) as raised:
        StoredWeights(folder).parameter("a")
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)


def test_a_full_memory_is_no_fault_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(MemoryError), harmless_reading(tmp_path):
        raise MemoryError


# ---- state.json


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no object": (lambda s: [1], "state.json"),
    "step": (lambda s: s | {"step": "4"}, "step should be a valid integer, got \"4\""),
    "negative": (lambda s: s | {"step": -1}, "step should be greater than or equal to 0, got -1"),
    "phase": (lambda s: s | {"phase": None}, "phase should be a valid string"),
    "unknown": (lambda s: s | {"code": 1}, "code is unknown"),
    "missing": (lambda s: {k: v for k, v in s.items() if k != "model"}, "model is missing"),
    "model": (lambda s: s | {"model": {"text": []}}, "model.text should be"),
    "layers": (lambda s: s | {"model": {"text": {"layers": "9"}}}, "model.text.layers should be a valid integer, got \"9\""),
    "no heads": (lambda s: s | {"model": {"text": {"heads": 0}}}, "model.text.heads=0 must be at least 1"),
    "lora": (lambda s: s | {"lora": {"rank": -3}}, "lora.rank=-3 must be at least 0"),
    "lora type": (lambda s: s | {"lora": {"rank": [1]}}, "lora.rank should be"),
    "inputs": (lambda s: s | {"inputs": {"tokenizer": 3}}, "inputs.tokenizer should be"),
    "media": (
        lambda s: s | {"inputs": {"tokenizer": "", "tokenizer_hash": "", "media": {"rule": 1}, "weights": ""}}, "inputs.media.rule"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_form_is_one_line(name: str, folder: Path) -> None:
    change, told = STATES[name]
    rewrite(folder, STATE, change(json.loads((folder / STATE).read_text())))
    with pytest.raises(UserError) as raised:
        read_run_state(folder)
    assert (
        told in str(raised.value)
        and "\n" not in str(raised.value)
        and str(folder) in str(raised.value)
    )


# ---- numbers that are none


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(bad: float, topology: Topology) -> None:
    from visionloom.train.checkpoint.finite import require_finite

    weights = {f"layer.{i}": torch.full((3,), bad, dtype=torch.bfloat16) for i in range(6)}
    with pytest.raises(UserError) as raised:
        require_finite(
            [
                *weights.items(),
                ("good", torch.full((9,), 3e38)),
                ("ids", torch.ones(2, dtype=torch.int64)),
            ],
            "x=y",
            topology,
        )
    named = "layer.0, layer.1, layer.2, layer.3 and 2 more"
    assert (
        str(raised.value)
        == f"x=y has NaN or infinite numbers in {named}: take weights from before training diverged"
    )


def test_tensors_by_name(folder: Path) -> None:
    assert {name: tuple(entry.size) for name, entry in entries(read_index(folder))} == {
        "a": (4, 6),
        "b": (5,),
    }
