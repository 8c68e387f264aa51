"""The files of an exported folder other than weights and config.json, so that transformers prepares inputs as training did.

Sources: transformers' Qwen2VLImageProcessor, Qwen3VLVideoProcessor and Qwen3VLProcessor, releases 4.57 and 5.23, and the files that
the Qwen3-VL models were published with. Nothing here imports torch.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.data.config import INSTRUCT, MediaConfig
from visionloom.data.encode.chat_template import format_of, template_of
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
    "patch_size": PATCH_SIZE,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "merge_size": MERGE_SIZE,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "resample": 3,  # bicubic
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
}
"""How every picture becomes patches here, which a processor must do too."""
STALE: Final = ("min_pixels", "max_pixels", "max_frames", "num_frames", "fps", "size")
"""Settings that would count as well as ours, or instead of them."""
TEMPLATES: Final = ("chat_template.jinja", "chat_template.json")
WRAPPED_VIDEO: Final = f"{VISION_START}{VIDEO}{VISION_END}"


def carry_companions(companions: Companions, out: Path) -> TokenTable | None:
    """Copy the files that go along into an export's folder; returns its tokenizer, None if there is none."""
    for folder in reversed(companions.others):
        carry(folder, out)
    if companions.tokenizer is not None:
        carry(companions.tokenizer, out, (TOKENIZER,) if companions.named else FROM_TOKENIZER)
    elif companions.missing:
        # One that came along with the weights is not the one of training.
        (out / TOKENIZER).unlink(missing_ok=True)
    return TokenTable.read(out, "out") if (out / TOKENIZER).is_file() else None


def write_serving_files(
    out: Path, companions: Companions, tokens: TokenTable | None, with_model: bool = True
) -> list[str]:
    """Write the run's rules into the files of an export's folder.

    Args:
        out: the folder, with the files that came along.
        companions: where these came from.
        tokens: the folder's tokenizer.
        with_model: the folder holds a model, and not only adapters of one.

    Returns:
        a line for each thing that was changed, or that the files cannot say.
    """
    notes = list(companions.missing)
    if with_model:
        write_generation(out, tokens.added if tokens else {})
    else:
        # Of the model under the adapters, which has its own.
        for name in (CONFIG, GENERATION):
            (out / name).unlink(missing_ok=True)
    if tokens is not None:
        write_tokenizer_settings(out, tokens)
        notes += write_template(out, tokens, companions.chat_format)
    if companions.media is not None:
        notes += write_processors(out, companions.media)
    return notes


def write_generation(out: Path, added: Mapping[str, int]) -> None:
    """Write generation_config.json with the tokens that end an answer; its settings of sampling are kept."""
    content = _read(out / GENERATION)
    stops = [added[stop] for stop in STOPS if stop in added]
    if stops:
        content["eos_token_id"] = stops
        content["pad_token_id"] = stops[-1]
        # Qwen's files name one, though prompts do not begin with it: it must be a token there is.
        if content.get("bos_token_id") is not None:
            content["bos_token_id"] = stops[-1]
    write_json(out / GENERATION, content)


def write_tokenizer_settings(out: Path, tokens: TokenTable) -> None:
    """Write tokenizer_config.json where none came along."""
    if not tokens.settings:
        made = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(out / SETTINGS, made | {"eos_token": TURN_END, "pad_token": END_OF_TEXT})


def write_template(out: Path, tokens: TokenTable, chat_format: str | None) -> Iterator[str]:
    """Write a chat template where none came along, and yield a line if one does not suit.

    It is the tokenizer's own, or the one of training: the latter too in place of one of another `chat_format`.
    """
    if not any((out / name).is_file() for name in TEMPLATES):
        own = tokens.settings.get("chat_template")
        text = own if isinstance(own, str) else template_of(chat_format or INSTRUCT)
        (out / TEMPLATES[0]).write_bytes(text.encode("utf-8", "backslashreplace"))
    template = next(out / name for name in TEMPLATES if (out / name).is_file())
    text = read_template(template)
    if chat_format is not None and format_of(text) != chat_format:
        yield replace_template(out, chat_format, format_of(text))
        return
    if WRAPPED_VIDEO in text and "wrap_videos" not in text:
        yield (
            f"{template.name} came with the weights and puts {VISION_START} and {VISION_END} around videos: transformers from 5.10"
            f" on keeps these two tokens, training has none: give it {VIDEO} alone there"
        )


def replace_template(out: Path, chat_format: str, other: str) -> str:
    """Write the template of a format in place of one of another; return the line that says so."""
    for name in TEMPLATES:
        (out / name).unlink(missing_ok=True)
    (out / TEMPLATES[0]).write_text(template_of(chat_format))
    return (
        f"{TEMPLATES[0]} is this program's, for data.chat_format={chat_format}: what came with the weights"
        f" writes chats in the format {other}"
    )


def read_template(path: Path) -> str:
    """Read a chat template; UserError if it is no text."""
    try:
        return read_file(path, "out").decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path.name}, which came with the weights, is no text: {error}: put back the file"
        ) from None


def write_processors(out: Path, media: MediaConfig) -> Iterator[str]:
    """Write the preprocessors' files with the run's rules.

    Yields a line where these differ from the files that came along, and for each rule that the files cannot say.
    """
    nested = _unnest(out)
    limits = limits_of(media)
    image = {"image_processor_type": "Qwen2VLImageProcessorFast"}
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "do_sample_frames": True}
    for name, kind, (least, most) in (
        (PREPROCESSOR, image, limits.image),
        (VIDEO_PREPROCESSOR, video | frame_rules(media), limits.video),
    ):
        came = _read(out / name) or nested[name]
        before = bounds(came)
        kept = {key: value for key, value in came.items() if key not in STALE}
        # Areas in pixels: transformers keeps the names of sides.
        size = {"longest_edge": most, "shortest_edge": least}
        ours = {"processor_class": "Qwen3VLProcessor", "size": size}
        write_json(out / name, kept | kind | PIXELS | ours)
        if before and before != (least, most):
            yield (
                f"{name} has size {least} to {most} pixels, as the run's data.media;"
                f" what came with the weights said {before[0]} to {before[1]}"
            )
    yield from beyond_processors(media)


def frame_rules(media: MediaConfig) -> dict[str, Any]:
    """Return how transformers' video processor chooses and bounds frames."""
    # As a whole number if it is one: 4.57 computes indices with it.
    whole = int(media.video_fps)
    is_capped = media.rule == "hf_capped"
    rules = {
        "fps": whole if whole == media.video_fps else media.video_fps,
        "min_frames": media.video_min_frames,
        "max_frames": media.video_max_frames,
        # Written also where it is off, since its default changes between versions.
        "cap_pixels_per_frame": is_capped,
    }
    if is_capped:
        _, most = limits_of(media).frame
        rules["max_video_tokens"] = most // FACTOR**2
    return rules


def beyond_processors(media: MediaConfig) -> Iterator[str]:
    """Yield a line for each of the run's rules that the processors' files cannot say."""
    if media.rule == "qwen_utils":
        yield (
            "data.media.rule=qwen_utils is not what transformers' processors do: prepare pictures and videos with qwen-vl-utils"
            " (image_patch_size=16) and give do_resize=False and do_sample_frames=False to the processor"
        )
    if media.rule == "hf_capped":
        rest = limits_of(media).frame[1] % FACTOR**2
        rounded = (
            f"; and data.media.frame_max_pixels is rounded down to whole tokens, by {rest} pixels"
        )
        yield (
            "data.media.rule=hf_capped: transformers 4.57 does not know cap_pixels_per_frame and leaves frames larger"
            + (rounded if rest else "")
        )


def bounds(content: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the areas in pixels that a preprocessor's file allows, least and most; None if it does not say."""
    size = content.get("size")
    # Some files have min_pixels and max_pixels inside size.
    settings = dict(size) if isinstance(size, dict) else {}
    settings |= {key: value for key, value in content.items() if value is not None}
    least = settings.get("min_pixels") or settings.get("shortest_edge")
    most = settings.get("max_pixels") or settings.get("longest_edge")
    if isinstance(least, int) and isinstance(most, int):
        return least, most
    return None


def _unnest(out: Path) -> dict[str, dict[str, Any]]:
    """Move the processors' settings out of processor_config.json, where transformers 5 writes them and 4.57 does not look.

    Returns:
        them, by the name of the file that each belongs in.
    """
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
    # Halves of surrogate pairs, which UTF-8 lacks, become JSON's own escapes.
    path.write_bytes(text.encode("utf-8", "backslashreplace"))
