"""What transformers makes of an exported folder: ids, pixels, grids and logits of some conversations, by its own processor and model.

    python served.py FOLDER CASES OUT

Imports nothing of this project, so that it also runs with another release of transformers first on the path. CASES is a file of
torch.save: a list of {"messages", "tools", "images": [uint8 H W 3], "videos": [(uint8 T H W 3, frames a second, sample?)]}.
"""

import sys
from typing import Any

import torch
import transformers
from PIL import Image as Pillow
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata


def serve(folder: str, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case alone: tensors on the host by name, and the prompt."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(folder)
    generation = model.generation_config
    found = []
    for case in cases:
        prompt = processor.apply_chat_template(
            case["messages"], tools=case["tools"], tokenize=False
        )
        inputs = processor(text=[prompt], return_tensors="pt", **media(case))
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        kept = {name: tensor for name, tensor in inputs.items() if isinstance(tensor, torch.Tensor)}
        found.append({**kept, "logits": logits.float(), "prompt": prompt})
    ends = {
        "eos": generation.eos_token_id,
        "pad": generation.pad_token_id,
        "release": transformers.__version__,
    }
    return [*found, ends]


def media(case: dict[str, Any]) -> dict[str, Any]:
    """The pictures and videos of a case as the processor takes them."""
    given: dict[str, Any] = {}
    if case["images"]:
        given["images"] = [Pillow.fromarray(image.numpy()) for image in case["images"]]
    if case["videos"]:
        frames, rates, samples = zip(*case["videos"], strict=True)
        given["videos"] = [video.permute(0, 3, 1, 2) for video in frames]
        given["do_sample_frames"] = samples[0]
        given["video_metadata"] = [
            VideoMetadata(
                total_num_frames=len(video), fps=rate, frames_indices=list(range(len(video)))
            )
            for video, rate in zip(frames, rates, strict=True)
        ]
    return given


if __name__ == "__main__":
    torch.save(serve(sys.argv[1], torch.load(sys.argv[2])), sys.argv[3])
