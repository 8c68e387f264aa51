"""What an exported folder has beside weights and config.json, so that transformers shows the model what training showed it.

Sources: transformers' Qwen2VLImageProcessor, Qwen3VLVideoProcessor and Qwen3VLProcessor, releases 4.57 and 5.23, and the files that
the Qwen3-VL models were published with. Nothing here imports torch.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.data.config import MediaConfig
from visionloom.data.encode.chat_template import TEMPLATE
from visionloom.data.encode.geometry import (
    FACTOR,
    MERGE_SIZE,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    limits_of,
)
from visionloom.data.encode.tokenizer import VIDEO, VISION_END, VISION_START
from visionloom.model.huggingface.config import CONFIG, END_OF_TEXT, TURN_END, read_file, read_json
from visionloom.train.exchange.companions import (
    FROM_TOKENIZER,
    GENERATION,
    PREPROCESSOR,
    PROCESSOR,
    VIDEO_PREPROCESSOR,
    Companions,
    carry,
)
from visionloom.train.exchange.token_table import SETTINGS, STOPS, TOKENIZER, TokenTable

PIXELS: Final[dict[str, Any]] = {
    "patch_size": PATCH_SIZE, "temporal_patch_size": TEMPORAL_PATCH_SIZE, "merge_size": MERGE_SIZE,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 255, "resample": 3,
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
}  # fmt: skip
"""How every picture becomes patches here: what a processor must say too. 3 is bicubic."""
STALE: Final = ("min_pixels", "max_pixels", "max_frames", "num_frames", "fps", "size")
"""Settings that would count beside ours, or instead of them."""
TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")
WRAPPED_VIDEO: Final = f"{VISION_START}{VIDEO}{VISION_END}"


def carry_companions(companions: Companions, out: Path) -> TokenTable | None:
    """Copy what goes along into an export's folder; returns its tokenizer, None if there is none."""
    for folder in reversed(companions.others):
        carry(folder, out)
    if companions.tokenizer is not None:
        carry(companions.tokenizer, out, (TOKENIZER,) if companions.named else FROM_TOKENIZER)
    elif (
        companions.missing
    ):  # another one came along with the weights: it is not what was trained with
        (out / TOKENIZER).unlink(missing_ok=True)
    return TokenTable.read(out, "out") if (out / TOKENIZER).is_file() else None


def write_serving_files(
    out: Path, companions: Companions, tokens: TokenTable | None, with_model: bool = True
) -> list[str]:
    """Make the files of an export's folder say what its run did; returns what they cannot say, or what was changed, a line each.

    Args:
        out: the folder, with what came along.
        companions: where that came from.
        tokens: the folder's tokenizer.
        with_model: whether the folder holds a model, or only adapters of one.
    """
    told = list(companions.missing)
    if with_model:
        _write_generation(out, tokens.added if tokens else {})
    else:
        for name in (CONFIG, GENERATION):
            (out / name).unlink(missing_ok=True)
    if tokens is not None:
        _write_tokenizer_settings(out, tokens)
        told += _write_template(out, tokens)
    if companions.media is not None:
        told += _write_processors(out, companions.media)
    return told


def _write_generation(out: Path, added: Mapping[str, int]) -> None:
    """generation_config.json with the tokens that end an answer; what it says of sampling is kept."""
    content = _read(out / GENERATION)
    stops = [added[stop] for stop in STOPS if stop in added]
    if stops:
        content |= {"eos_token_id": stops, "pad_token_id": stops[-1]}
        content |= {"bos_token_id": stops[-1]} if content.get("bos_token_id") is not None else {}
    write_json(out / GENERATION, content)


def _write_tokenizer_settings(out: Path, tokens: TokenTable) -> None:
    if not tokens.settings:
        made = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(out / SETTINGS, made | {"eos_token": TURN_END, "pad_token": END_OF_TEXT})


def _write_template(out: Path, tokens: TokenTable) -> Iterator[str]:
    """A chat template where none came along: the tokenizer's own, or the one of training."""
    if not any((out / name).is_file() for name in TEMPLATES):
        own = tokens.settings.get("chat_template")
        (out / TEMPLATES[0]).write_bytes(
            (own if isinstance(own, str) else TEMPLATE).encode("utf-8", "backslashreplace")
        )
    template = next(out / name for name in TEMPLATES if (out / name).is_file())
    try:
        text = read_file(template, "out").decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{template.name}, which came with the weights, is no text: {error}: put back the file"
        ) from None
    if WRAPPED_VIDEO in text and "wrap_videos" not in text:
        yield (
            f"{template.name} came with the weights and puts {VISION_START} and {VISION_END} around videos: transformers from 5.10"
            f" on keeps these two tokens, training has none: give it {VIDEO} alone there"
        )


def _write_processors(out: Path, media: MediaConfig) -> Iterator[str]:
    """The preprocessors' files with the run's rules; yields where these differ from what came along, and what they cannot say."""
    nested = _unnest(out)
    limits = limits_of(media)
    sizes = {PREPROCESSOR: limits.image, VIDEO_PREPROCESSOR: limits.video}
    kinds: dict[str, dict[str, Any]] = {
        PREPROCESSOR: {"image_processor_type": "Qwen2VLImageProcessorFast"},
        VIDEO_PREPROCESSOR: {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "do_sample_frames": True,
        }
        | _frame_rules(media),
    }
    for name, (least, most) in sizes.items():
        came = _read(out / name) or nested[name]
        before = bounds(came)
        kept = {key: value for key, value in came.items() if key not in STALE}
        size = {"longest_edge": most, "shortest_edge": least}
        write_json(
            out / name,
            kept | kinds[name] | PIXELS | {"processor_class": "Qwen3VLProcessor", "size": size},
        )
        if before and before != (least, most):
            yield (
                f"{name} has size {least} to {most} pixels, as the run's data.media; what came with the weights said"
                f" {before[0]} to {before[1]}"
            )
    yield from _beyond_processors(media)


def _frame_rules(media: MediaConfig) -> dict[str, Any]:
    """How transformers' video processor chooses and bounds frames; whether it caps each must be said, since its default changes."""
    rules = {
        "fps": media.video_fps,
        "min_frames": media.video_min_frames,
        "max_frames": media.video_max_frames,
    }
    capped = media.rule == "hf_capped"
    cap = {"cap_pixels_per_frame": capped} | (
        {"max_video_tokens": limits_of(media).frame[1] // FACTOR**2} if capped else {}
    )
    whole = int(media.video_fps)
    return rules | cap | ({"fps": whole} if whole == media.video_fps else {})


def _beyond_processors(media: MediaConfig) -> Iterator[str]:
    if media.rule == "qwen_utils":
        yield (
            "data.media.rule=qwen_utils is not what transformers' processors do: prepare pictures and videos with qwen-vl-utils"
            " (image_patch_size=16) and give do_resize=False and do_sample_frames=False to the processor"
        )
    if media.rule == "hf_capped":
        rest = limits_of(media).frame[1] % FACTOR**2
        yield (
            "data.media.rule=hf_capped: transformers 4.57 does not know cap_pixels_per_frame and leaves frames larger"
            + (
                f"; and data.media.frame_max_pixels is rounded down to whole tokens, by {rest} pixels"
                if rest
                else ""
            )
        )


def bounds(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """The areas in pixels that a preprocessor's file allows; None if it does not say."""
    size = content.get("size")
    size = size if isinstance(size, dict) else {}
    said = size | {
        key: value for key, value in content.items() if value is not None
    }  # some files have these two inside size
    least, most = (
        said.get("min_pixels") or said.get("shortest_edge"),
        said.get("max_pixels") or said.get("longest_edge"),
    )
    return (least, most) if isinstance(least, int) and isinstance(most, int) else None


def _unnest(out: Path) -> dict[str, dict[str, Any]]:
    """Take the processors' settings out of processor_config.json, where transformers 5 writes them and 4.57 does not look."""
    content = _read(out / PROCESSOR)
    parts = {
        PREPROCESSOR: content.pop("image_processor", None),
        VIDEO_PREPROCESSOR: content.pop("video_processor", None),
    }
    if (out / PROCESSOR).is_file():
        write_json(out / PROCESSOR, content | {"processor_class": "Qwen3VLProcessor"})
    return {name: part if isinstance(part, dict) else {} for name, part in parts.items()}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, "out") if path.exists() else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as a JSON file, as transformers does."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(
        text.encode("utf-8", "backslashreplace")
    )  # halves of surrogate pairs become JSON's own escapes
