"""An export shows the model what training showed it: ids, pixels, grids, logits and the tokens that end an answer.

References: transformers' own processor, chat template engine, tokenizer and model on the exported folder: the installed release,
and 4.57, with which the Qwen3-VL models were published, in a folder of its own.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visionloom.data.encode.encode import EncodedSample, encode
from visionloom.data.encode.patches import decode_patches
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.shards.sample import Image, Message, Sample, Text, Think, ToolCall, Video
from visionloom.data.stream.batch import pack_prompts, widen
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.data.encode.test_image import file, smooth
from visionloom.tests.data.encode.test_video import described, every_frame, film
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.exchange.served import serve
from visionloom.tests.train.runs import run_config
from visionloom.tests.train.test_layouts import train
from visionloom.train.checkpoint import read as checkpoint
from visionloom.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[3]
FRAMES = 5
CLIP = film(list(range(100)))
"""Four seconds at 25 frames a second."""
SIDES = {
    "small.png": (20, 24),
    "wide.png": (90, 700),
    "large.png": (300, 400),
    "plain.png": (64, 96),
}
"""Height and width; the demo's pictures have from 1,024 to 65,536 pixels."""
MEMBERS = {name: file(smooth(*sides, seed)) for seed, (name, sides) in enumerate(SIDES.items())}
MEMBERS |= {f"{number}.png": file(smooth(120, 160, 10 + number)) for number in range(FRAMES)} | {
    "a.mp4": CLIP
}
SMALL, WIDE, LARGE, PLAIN = (Image(name, width, height) for name, (height, width) in SIDES.items())
STILLS = Video(
    tuple(f"{n}.png" for n in range(FRAMES)), tuple(n / 2 for n in range(FRAMES)), 160, 120
)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "“Where?” <tool>",
            "parameters": {"type": "object"},
        },
    },
)


def chat(*turns: Message, tools: tuple[Any, ...] = ()) -> Sample:
    return Sample("s", "chat", turns, tools=tools)


def user(*content: Any) -> Message:
    return Message("user", content)


def says(*content: Any) -> Message:
    return Message("assistant", content)


SAMPLES = {
    "text": chat(Message("system", (Text("Be brief. 你好"),)), user(Text("Why?! 12 + 3.5")), says(Text("So: café\n\n  yes."))),
    "small picture": chat(user(SMALL, Text("What?")), says(Text("A seven."))),
    "large picture": chat(user(Text("Look: "), LARGE, Text(" here")), says(Text("Too large."))),
    "pictures": chat(
        user(Text("First "), WIDE, Text("?second"), PLAIN), says(Text("Two.")), user(SMALL, LARGE, Text("And now?")), says(Text("4"))
    ),
    "frames": chat(user(STILLS, Text("When?")), says(Text("<1.0 seconds>"))),
    "video file": chat(user(Text("Watch:"), described(100), Text("what moves?")), says(Text("A square."))),
    "video and picture": chat(user(PLAIN, Text(" in "), STILLS, Text("?")), says(Text("Yes"))),
    "tools": chat(
        Message("system", (Text("Use tools."),)), user(Text("Where?")), says(Text("Let me see"), ToolCall("look", {"at": [1, "é"]})),
        Message("tool", (Text("left"),)), Message("tool", (PLAIN, Text("right"))), says(Text("There.")), tools=TOOLS,
    ),
    "thinking": chat(user(Text("3 + 4?")), says(Think("3 and 4 is 7."), Text("7")), user(Text("Sure?")), says(Think("Yes."), Text("7"))),
    "thinking with tools": chat(
        user(WIDE, Text("Find it")), says(Think("Look."), ToolCall("look", {}), ToolCall("look", {"x": None})),
        Message("tool", (Text("{}"),)), says(Think("Found."), Text("Here")), tools=TOOLS,
    ),
}  # fmt: skip


def as_messages(sample: Sample) -> list[dict[str, Any]]:
    """A conversation as users of transformers write it."""
    made = []
    for message in sample.messages:
        turn: dict[str, Any] = {"role": message.role, "content": []}
        for element in message.content:
            match element:
                case Text():
                    turn["content"].append({"type": "text", "text": element.text})
                case Think():
                    turn["reasoning_content"] = element.text
                case ToolCall():
                    call = {
                        "type": "function",
                        "function": {"name": element.name, "arguments": dict(element.arguments)},
                    }
                    turn.setdefault("tool_calls", []).append(call)
                case _:
                    turn["content"].append(
                        {"type": "image" if isinstance(element, Image) else "video"}
                    )
        made.append(turn)
    return made


def as_case(sample: Sample) -> dict[str, Any]:
    """What `served.py` reads."""
    shown = [element for message in sample.messages for element in message.content]
    return {
        "messages": as_messages(sample),
        "tools": list(sample.tools) or None,
        "images": [pixels(MEMBERS[one.ref]) for one in shown if isinstance(one, Image)],
        "videos": [frames_of(one) for one in shown if isinstance(one, Video)],
    }


def pixels(data: bytes) -> torch.Tensor:
    from visionloom.tests.data.encode.test_image import by_pillow

    return torch.from_numpy(by_pillow(data).copy())


def frames_of(video: Video) -> tuple[torch.Tensor, float, bool]:
    """All frames, their rate, and whether the processor is to choose among them."""
    if video.ref is not None:
        return torch.from_numpy(np.stack(every_frame(MEMBERS[video.ref]))), video.fps, True
    return torch.stack([pixels(MEMBERS[ref]) for ref in video.refs]), 2.0, False


def ours(folder: Path, config: RunConfig) -> list[tuple[EncodedSample, torch.Tensor]]:
    """Each sample as training encodes it, with our model's logits; runs on a rank of the pool."""
    topology = topologies.start(ParallelConfig(), torch.device("cpu"))
    model = Qwen3VL(config.model, topology)
    checkpoint.load_weights(checkpoint.read(folder), [model], topology)
    tokenizer, rules, found = Tokenizer(config.data.tokenizer), config.data.media, []
    for sample in SAMPLES.values():
        encoded = encode(sample, tokenizer, rules)
        rows = decode_patches(encoded, MEMBERS.__getitem__, rules)
        encoded = replace(encoded, patches=rows)
        batch, _ = pack_prompts([encoded], tokenizer.pad_id)
        with torch.no_grad():
            found.append((encoded, model.logits(model.prepare(batch)).float()))
    return found


def assert_equal(theirs: dict[str, Any], sample: EncodedSample, logits: torch.Tensor) -> None:
    """Ids, grids and pixels to the bit, logits to rounding."""
    assert theirs["input_ids"][0].tolist() == sample.input_ids.tolist()
    assert sample.patches is not None
    rows = (
        np.split(widen(sample.patches, 1536), np.cumsum(sample.grids.prod(1))[:-1])
        if len(sample.grids)
        else []
    )
    for kind, grid, values in (
        (Image, "image_grid_thw", "pixel_values"),
        (Video, "video_grid_thw", "pixel_values_videos"),
    ):
        own = [number for number, media in enumerate(sample.media) if isinstance(media, kind)]
        assert theirs.get(grid, torch.zeros(0, 3)).tolist() == sample.grids[own].tolist()
        if own:
            shown = ((theirs[values] + 1) * 127.5).round().numpy().astype(np.uint8)
            np.testing.assert_array_equal(shown, np.concatenate([rows[number] for number in own]))
    assert float((theirs["logits"] - logits).abs().max()) <= 1e-4 * float(logits.abs().max())


@pytest.fixture(scope="module", params=["tiny", "tiny_moe"])
def exported(
    request: pytest.FixtureRequest,
    pool: RankPool,
    demo_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[tuple[EncodedSample, torch.Tensor]]]:
    """An export of a checkpoint of a short run that began with nothing, and what training makes of the samples."""
    folder = tmp_path_factory.mktemp("run")
    config = run_config(demo_data, folder, 4, 1, f"model={request.param}")
    pool.run(1, train, config)
    (stored,) = (folder / "checkpoints" / "multimodal").glob("step-*")
    pool.run(1, export, stored, folder / "out")
    return folder / "out", pool.run(1, ours, stored, config)[0]


def export(stored: Path, out: Path) -> None:
    """The command; runs on a rank of the pool."""
    from visionloom.launch.convert import main

    assert main(["export", f"checkpoint={stored}", f"out={out}"]) == 0


def assert_served(
    found: list[dict[str, Any]], expected: list[tuple[EncodedSample, torch.Tensor]], folder: Path
) -> None:
    *cases, ends = found
    assert len(cases) == len(expected) == 10
    for theirs, (sample, logits) in zip(cases, expected, strict=True):
        assert_equal(theirs, sample, logits)
    tokenizer = Tokenizer(str(folder))
    assert (ends["eos"], ends["pad"]) == (list(tokenizer.stop_ids), tokenizer.pad_id)


def test_the_installed_transformers_shows_what_training_showed(exported: tuple[Path, Any]) -> None:
    folder, expected = exported
    assert_served(
        serve(str(folder), [as_case(sample) for sample in SAMPLES.values()]), expected, folder
    )


@pytest.fixture(scope="module")
def old_release() -> Path:
    """transformers 4.57 with what it needs in other releases than ours, installed once; it fails where that cannot be had."""
    folder = ROOT / ".venv" / "transformers-4.57"
    wanted = ["transformers==4.57.6", "huggingface-hub==0.36.2", "tokenizers==0.22.2"]
    if not (folder / "transformers").is_dir():
        install = ["install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
        with_uv = subprocess.run(
            [sys.executable, "-m", "uv", "pip", *install, "--python", sys.executable], check=False
        )
        if with_uv.returncode:
            subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    return folder


@pytest.mark.long
def test_transformers_4_shows_what_training_showed(
    exported: tuple[Path, Any], old_release: Path, tmp_path: Path
) -> None:
    folder, expected = exported
    torch.save([as_case(sample) for sample in SAMPLES.values()], tmp_path / "cases")
    command = [
        sys.executable,
        str(ROOT / "tests/train/exchange/served.py"),
        str(folder),
        str(tmp_path / "cases"),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(old_release)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out")
    assert found[-1]["release"].startswith("4.57.")
    assert_served(found, expected, folder)
