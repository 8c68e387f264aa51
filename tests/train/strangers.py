"""A small checkpoint that torch itself writes, for tests of what strangers may do to one."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from visionloom.model.config import ModelConfig
from visionloom.train.checkpoint.read import FORMAT, MANIFEST, FileEntry, write_manifest
from visionloom.train.checkpoint.state_file import STATE, RunState

TENSORS = {"a": torch.arange(24.0).reshape(4, 6), "b": torch.ones(5, dtype=torch.bfloat16)}
PLAN = {"datasets": {"text": ["0123", 1.0, "error"]}, "tokenizer": "0123abcd"}
DATA = {
    "version": 3, "plan_hash": "x", "step": 4, "block": 0, "first_pack": 0, "draws": {"text": 3}, "origin": {"step": 0, "draws": {}},
    "plan": PLAN,
}  # fmt: skip


def write_checkpoint(folder: Path, tensors: dict[str, Any] | None = None) -> Path:
    """Two tensors, an entry of plain data, and what belongs to them."""
    folder.mkdir(parents=True)
    writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
    save({**(tensors or TENSORS), "plain": {"x": [1, 2]}}, storage_writer=writer, no_dist=True)
    (folder / FORMAT).write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    run_state = RunState("sft", 4, 4, 4, DATA, asdict(ModelConfig()), 4)
    (folder / STATE).write_text(json.dumps(asdict(run_state)))
    list_files(folder)
    return folder


def list_files(folder: Path) -> None:
    """A manifest of the files as they are: a stranger can write one for any content."""
    files = [path for path in folder.iterdir() if path.name != MANIFEST]
    write_manifest(folder, {path.name: FileEntry.of(path) for path in files})
