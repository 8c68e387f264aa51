"""megatron-energon on shards exported by `data.py export-energon`, in a process of its own; prints JSON.

    python benchmarks/data/energon_peer.py packs|read|resume|order FOLDER [--tokenizer FOLDER] [--buffer 16] [--workers 0] ...

`packs` is what a trainer built on it does: Pillow, transformers' default image processor and tokenizer in `encode_sample`,
first-fit decreasing over the packing buffer in `select_samples_to_pack`, and concatenation in `pack_selected_samples`.
"""

import argparse
import io
import json
import os
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2] / ".link")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from PIL import Image as Pillow
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from visionloom.benchmarks.data.processes import steady

LENGTH = 8192
MERGED = 4
"""Patches behind a visual token."""


@edataclass
class Members(Sample):
    """The members of a sample, undecoded."""

    parts: dict[str, bytes]


@edataclass
class Encoded(Sample):
    """One sample, or a pack of several, ready for the model."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    lengths: list[int]


@stateless
def members(sample: dict[str, Any]) -> Members:
    """The members of a raw sample."""
    parts = {name: data for name, data in sample.items() if not name.startswith("__")}
    return Members(**basic_sample_keys(sample), parts=parts)


class Reading(DefaultTaskEncoder):
    """Samples as they are, their JSON parsed."""

    decoder = None
    cookers = [Cooker(members)]  # noqa: RUF012  megatron-energon reads this name

    @stateless
    def encode_sample(self, sample: Members) -> Members:
        """Parse the JSON."""
        json.loads(sample.parts["json"])
        return sample

    def batch(self, samples: list[Members]) -> list[Members]:
        """A list."""
        return samples

    def encode_batch(self, batch: list[Members]) -> list[Members]:
        """Nothing more."""
        return batch


class Packing(Reading):
    """Chats of a picture, a question and an answer into packs."""

    def __init__(self, tokenizer: str) -> None:
        super().__init__()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{tokenizer}/tokenizer.json")
        half = [0.5, 0.5, 0.5]
        limits = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
        self.processor = Qwen2VLImageProcessor(
            size=limits, patch_size=16, image_mean=half, image_std=half
        )

    @stateless
    def encode_sample(self, sample: Members) -> Encoded:
        """Decode, resize, cut, normalise, render and tokenise."""
        question, answer = json.loads(sample.parts["json"])["messages"]
        pixels = self.processor(
            images=[Pillow.open(io.BytesIO(sample.parts["img0.jpg"])).convert("RGB")],
            return_tensors="pt",
        )
        grid = pixels["image_grid_thw"]
        shown = (
            "<|vision_start|>" + "<|image_pad|>" * (int(grid.prod()) // MERGED) + "<|vision_end|>"
        )
        prompt = f"<|im_start|>user\n{shown}{question['content'][1]['text']}<|im_end|>\n<|im_start|>assistant\n"
        asked = self.tokenizer(prompt)["input_ids"]
        said = self.tokenizer(f"{answer['content'][0]['text']}<|im_end|>\n")["input_ids"]
        ids, labels = torch.tensor(asked + said), torch.tensor([-100] * len(asked) + said)
        return Encoded.derive_from(
            sample,
            input_ids=ids,
            labels=labels,
            pixel_values=pixels["pixel_values"],
            image_grid_thw=grid,
            lengths=[len(ids)],
        )

    def select_samples_to_pack(self, samples: list[Encoded]) -> list[list[Encoded]]:
        """First-fit decreasing; the buffer is emptied."""
        packs, rooms = list[list[Encoded]](), list[int]()
        for sample in sorted(samples, key=lambda one: -len(one.input_ids)):
            size = len(sample.input_ids)
            place = next((at for at, room in enumerate(rooms) if room >= size), len(rooms))
            if place == len(rooms):
                rooms.append(LENGTH)
                packs.append([])
            rooms[place] -= size
            packs[place].append(sample)
        return packs

    @stateless
    def pack_selected_samples(self, samples: list[Encoded]) -> Encoded:
        """One pack."""
        names = ("input_ids", "labels", "pixel_values", "image_grid_thw")
        joined = {name: torch.cat([getattr(sample, name) for sample in samples]) for name in names}
        return Encoded.derive_from(
            samples[0], **joined, lengths=[size for one in samples for size in one.lengths]
        )


def loader(
    folder: Path,
    encoder: Reading,
    workers: int,
    buffer: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Any:
    """A savable loader that never ends, in the order of the shards."""
    config = WorkerConfig(rank=rank, world_size=ranks, num_workers=workers)
    dataset = get_train_dataset(
        folder,
        batch_size=1,
        packing_buffer_size=buffer,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        worker_config=config,
        task_encoder=encoder,
        split_part="train",
    )
    return get_savable_loader(dataset)


def packs(arguments: argparse.Namespace) -> dict[str, float]:
    """The cost of packs."""
    widest = 0.0

    def counted() -> Iterator[tuple[int, int]]:
        nonlocal widest
        for (pack,) in loader(
            arguments.folder, Packing(arguments.tokenizer), arguments.workers, arguments.buffer
        ):
            widest = pack.pixel_values.nbytes / len(pack.pixel_values)
            yield len(pack.image_grid_thw), len(pack.input_ids)

    return {**steady(counted(), arguments.warm, arguments.images), "bytes_a_patch": widest}


def read(arguments: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of a sample without decoding."""
    samples = iter(loader(arguments.folder, Reading(), 0))
    for _ in range(50):
        next(samples)
    started = time.process_time()
    for _ in range(arguments.images):
        next(samples)
    return {"seconds": (time.process_time() - started) / arguments.images}


def resume(arguments: argparse.Namespace) -> dict[str, float]:
    """CPU seconds from a state to its first pack, and the state's bytes."""
    encoder = Packing(arguments.tokenizer)
    whole = loader(arguments.folder, encoder, 0, arguments.buffer)
    steps = iter(whole)
    for _ in range(arguments.warm):
        next(steps)
    state = pickle.dumps(whole.save_state_rank())
    fresh = loader(arguments.folder, encoder, 0, arguments.buffer)
    started = time.process_time()
    fresh.restore_state_rank(pickle.loads(state))
    next(iter(fresh))
    return {"seconds": time.process_time() - started, "bytes": len(state)}


def order(arguments: argparse.Namespace) -> dict[str, float]:
    """Share of the first samples of one rank without workers that two ranks, and two workers, read as well."""
    count = arguments.images

    def first(workers: int, ranks: int) -> set[str]:
        found = set[str]()
        for rank in range(ranks):
            samples = iter(loader(arguments.folder, Reading(), workers, rank=rank, ranks=ranks))
            found |= {next(samples)[0].__key__ for _ in range(count // ranks)}
        return found

    alone = first(0, 1)
    return {
        "two_ranks": len(alone & first(0, 2)) / count,
        "two_workers": len(alone & first(2, 1)) / count,
    }


def main() -> None:
    """Do one of these and print what was found."""
    tasks = {"packs": packs, "read": read, "resume": resume, "order": order}
    parser = argparse.ArgumentParser(description="megatron-energon's loader, measured")
    parser.add_argument("task", choices=tasks)
    parser.add_argument("folder", type=Path, help="a dataset with .nv-meta/")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument(
        "--buffer", type=int, default=16, help="samples of the packing buffer (default 16)"
    )
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--warm", type=int, default=10, help="packs before the counting begins (default 10)"
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="pictures, or samples, to count (default 1000)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(tasks[arguments.task](arguments)))


if __name__ == "__main__":
    main()
