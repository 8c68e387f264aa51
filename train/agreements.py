"""What must agree before anything is trained or converted: model, tokenizer, the files of a Hugging Face folder, a checkpoint.

Each agreement is a function that yields a line for each fault, naming both sides and the fix; AGREEMENTS is the whole page.
Nothing here imports torch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import isclose
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.common.places import PlaceError, locate, read_located
from visionloom.data.encode.tokenizer import END_OF_TEXT, REQUIRED
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.config import (
    CONFIG,
    NOT_THE_MODEL,
    TOKENS,
    differences,
    read_config,
    read_json,
)
from visionloom.model.huggingface.peft_config import read_adapter_config
from visionloom.train.checkpoint.state_file import STATE, model_of, read_run_state
from visionloom.train.config import RunConfig
from visionloom.train.exchange.companions import (
    GENERATION,
    PREPROCESSOR,
    PROCESSOR,
    VIDEO_PREPROCESSOR,
    companions_of,
    tokenizer_hash,
    tokenizer_of,
)
from visionloom.train.exchange.serving import PIXELS
from visionloom.train.exchange.token_table import SETTINGS, STOPS, TOKENIZER, TokenTable

ROWS: Final = 128
"""Rows of a vocabulary are best a multiple of this: it divides by any number of tensor ranks."""
LATEST: Final = "checkpoints/latest"
LONGEST_POINTER: Final = 4096


@dataclass(frozen=True)
class Sides:
    """What is compared; what is None is not there to be compared."""

    model: ModelConfig
    vocabulary: str
    """How a message calls the model's rows: `model.text.vocab_size=512`."""
    tokens: TokenTable | None = None
    """The tokenizer that is used."""
    option: str = ""
    """The option that names `folder`, or the checkpoint that the folder belongs to."""
    folder: Path | None = None
    """A Hugging Face folder, or the companions of a checkpoint."""
    checkpoint: Path | None = None
    """A checkpoint whose weights are used."""
    resuming: bool = False
    """Whether `checkpoint` is of this run and has continued with another tokenizer only if data.on_change allows it."""
    recipe: bool = True
    """Whether `model` is a recipe's, which the weights must have been made for."""
    adapters: bool = False
    """Whether only adapters train."""

    def where(self, name: str) -> str:
        """How a message calls a file of the folder."""
        return f"{self.folder}/{name}"

    def read(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the folder; empty if it is not there."""
        there = self.folder is not None and (self.folder / name).is_file()
        return (
            read_json(self.folder / name, self.option) if there and self.folder is not None else {}
        )

    @property
    def text(self) -> dict[str, Any]:
        """text_config of the folder's config.json."""
        return _section(self.read(CONFIG), "text_config")


def check_run(config: RunConfig, checkpoint: str = "") -> None:
    """Refuse a run whose parts do not agree.

    Args:
        config: the run's.
        checkpoint: one that is to be evaluated; empty: the newest of the run, if there is one.

    Raises:
        UserError: one line for each disagreement.
    """
    init, tokens = config.init, TokenTable.read(Path(config.data.tokenizer), "data.tokenizer")
    newest = None if checkpoint else _newest(Path(config.run.folder))
    own = Path(checkpoint) if checkpoint else newest
    base = Sides(
        config.model, f"model.text.vocab_size={config.model.text.vocab_size}", tokens, adapters=config.lora.rank > 0,
        resuming=newest is not None and config.data.on_change == "new_phase",
    )  # fmt: skip
    if config.lora.adapter:
        read_adapter_config(Path(config.lora.adapter), config.lora)
    lines: list[str] = []
    if init.huggingface:
        lines += faults(_with(base, "init.huggingface", Path(init.huggingface)))
    elif init.checkpoint:
        lines += faults(_with(base, "init.checkpoint", Path(init.checkpoint)))
    else:
        lines += faults(base)
    if own is not None:
        option = "checkpoint" if checkpoint else "run.folder"
        lines += [line for line in faults(_with(base, option, own)) if line not in lines]
    if lines:
        raise UserError(*lines)


def check_folder(folder: Path, option: str) -> None:
    """Refuse a Hugging Face folder whose files do not agree with each other; UserError with one line for each disagreement."""
    tokens = TokenTable.read(folder, option) if (folder / TOKENIZER).is_file() else None
    model = read_config(folder, option)
    sides = Sides(
        model,
        f"{folder}/{CONFIG} with vocab_size {model.text.vocab_size}",
        tokens,
        option,
        folder,
        recipe=False,
    )
    if lines := faults(sides):
        raise UserError(*lines)


def check_export(checkpoint: Path, source: Path | None, option: str) -> None:
    """Refuse to put files into an export that do not agree with its checkpoint; UserError with one line for each disagreement.

    Args:
        checkpoint: to export.
        source: folder or checkpoint that files are taken from; None: the checkpoint's own run.
        option: that names `source`.
    """
    run_state = read_run_state(checkpoint)
    model = model_of(run_state)
    vocabulary = f"{checkpoint} with model.text.vocab_size={model.text.vocab_size}"
    folder = next(iter(companions_of(source)), None) if source is not None else None
    place = (
        folder
        if folder is not None and (folder / TOKENIZER).is_file()
        else tokenizer_of(checkpoint, run_state)
    )
    tokens = (
        TokenTable.read(place, option if place == folder else "tokenizer")
        if place is not None
        else None
    )
    if lines := faults(Sides(model, vocabulary, tokens, option, folder, checkpoint, recipe=False)):
        raise UserError(*lines)


def faults(sides: Sides) -> list[str]:
    """All disagreements, a line each."""
    return list(dict.fromkeys(line for agreement in AGREEMENTS for line in agreement(sides)))


# ---- the agreements


def every_token_has_a_row(sides: Sides) -> Iterator[str]:
    """The highest id of the tokenizer lies below the rows of the embedding.

    Without this a rank would read past its table, or, where tensor ranks share it, take zeros for tokens that none of them has.
    """
    if sides.tokens is None:
        return
    (token, last), rows = sides.tokens.last, sides.model.text.vocab_size
    if last >= rows:
        fix = "give the tokenizer of these weights"
        if sides.recipe and sides.checkpoint is None:
            held = sides.text.get("vocab_size")
            enough = max(-(-(last + 1) // ROWS) * ROWS, held if isinstance(held, int) else 0)
            fix = f"set model.text.vocab_size={enough}, or give the tokenizer that the model was made for"
        yield f"{sides.tokens.name} has ids up to {last} ({token}), but {sides.vocabulary} has rows for 0 to {rows - 1} only: {fix}"


def adapted_tokens_have_trained_rows(sides: Sides) -> Iterator[str]:
    """Rows that the folder lacks are zeros, which adapters never train."""
    if sides.tokens is None or not sides.adapters or sides.option != "init.huggingface":
        return
    (token, last), rows = sides.tokens.last, sides.text.get("vocab_size")
    if isinstance(rows, int) and rows <= last < sides.model.text.vocab_size:
        yield (
            f"{sides.tokens.name} has ids up to {last} ({token}), but {sides.where(CONFIG)} has {rows} rows, and lora.rank trains none:"
            " give the folder's own tokenizer, or train all weights with lora.rank=0"
        )


def special_tokens_are_there(sides: Sides) -> Iterator[str]:
    """The tokenizer of a run has the tokens that prompts are made of."""
    missing = [
        token for token in REQUIRED if sides.tokens is not None and token not in sides.tokens.ids
    ]
    if sides.tokens is not None and sides.recipe and missing:
        yield f"{sides.tokens.name} lacks special tokens of Qwen3-VL: {' '.join(missing)}"


def a_tokenizer_says_one_thing(sides: Sides) -> Iterator[str]:
    """tokenizer_config.json and added_tokens.json name the tokens that tokenizer.json has, which alone is read here."""
    if sides.tokens is None:
        return
    table, said = sides.tokens, dict[str, int]()
    for key, added in _section(table.settings, "added_tokens_decoder").items():
        if isinstance(added, dict) and key.isascii() and key.isdigit() and len(key) < 10:
            said[str(added.get("content"))] = int(key)
    path = table.folder / "added_tokens.json"
    said |= read_json(path, table.name.partition("=")[0]) if path.is_file() else {}
    for token, number in said.items():
        if table.ids.get(token) != number:
            has = f"has it as {table.ids[token]}" if token in table.ids else "lacks it"
            yield f"{table.name}: {SETTINGS} or added_tokens.json says {token} is {number}, but {TOKENIZER} {has}: save the tokenizer anew"
            return


def answers_end_alike(sides: Sides) -> Iterator[str]:
    """The tokens that end answers, in generation and in the tokenizer's settings, are those that end them in training."""
    if sides.tokens is None:
        return
    added = sides.tokens.added
    stops = {added[stop]: stop for stop in STOPS if stop in added}
    known = " or ".join(f"{number} ({stop})" for number, stop in stops.items())
    # Trainers write these ids beside text_config, where transformers looks too if there is no generation_config.json.
    for name, said in (
        (GENERATION, sides.read(GENERATION)),
        (CONFIG, sides.text),
        (CONFIG, sides.read(CONFIG)),
    ):
        ends = said.get("eos_token_id")
        if (
            stops
            and ends is not None
            and any(end not in list(stops) for end in (ends if isinstance(ends, list) else [ends]))
        ):
            yield (
                f"{sides.where(name)} has eos_token_id {ends}, but with {sides.tokens.name} answers end with {known}:"
                " correct the file, or give the tokenizer of these weights"
            )
        pad = said.get("pad_token_id")
        if stops and pad is not None and pad not in added.values():
            yield (
                f"{sides.where(name)} has pad_token_id {pad}, but {sides.tokens.name} pads with {added.get(END_OF_TEXT)} and has no special token"
                f" {pad}: correct the file, or give the tokenizer of these weights"
            )
    end = sides.tokens.settings.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if stops and end is not None and end not in stops.values():
        yield f"{sides.tokens.name}: {SETTINGS} has eos_token {end}, but answers end with {known}: correct the file"


def vision_tokens_are_alike(sides: Sides) -> Iterator[str]:
    """config.json and the tokenizer mean the same tokens by pictures, videos, and the beginning and end of both."""
    raw = sides.read(CONFIG)
    if sides.tokens is None or sides.resuming:
        return
    for key, spelling in TOKENS.items():
        said, has = raw.get(key), sides.tokens.ids.get(spelling)
        if said is not None and has is not None and said != has:
            yield (
                f"{sides.where(CONFIG)} has {key} {said}, but {sides.tokens.name} has {spelling} as {has}:"
                " give the tokenizer of these weights, or correct config.json"
            )


def the_tokenizer_is_that_of_the_weights(sides: Sides) -> Iterator[str]:
    """The tokenizer beside the weights gives the same ids."""
    if (
        sides.tokens is None
        or sides.folder is None
        or not (sides.folder / TOKENIZER).is_file()
        or _is_trained(sides)
    ):
        return
    theirs = TokenTable.read(sides.folder, sides.option)
    for difference in sides.tokens.differences(theirs) if not sides.resuming else ():
        yield (
            f"{sides.tokens.name} is not the tokenizer beside the weights, {sides.where(TOKENIZER)}: {difference}:"
            f" give that folder as the tokenizer"
        )


def the_tokenizer_is_that_of_training(sides: Sides) -> Iterator[str]:
    """The tokenizer gives the ids that a checkpoint was trained with."""
    if sides.tokens is None or sides.checkpoint is None or sides.resuming:
        return
    run_state = read_run_state(sides.checkpoint)
    known = tokenizer_hash(run_state)
    if not known or sides.tokens.hash.startswith(known):
        return
    place = tokenizer_of(sides.checkpoint, run_state)
    if place is None and sides.option == "hf":  # named because the one of training is gone
        return
    if place is None:
        differs = f"its tokenizer.json had the SHA-256 {known[:8]}, this one has {sides.tokens.hash[:8]}, and the one of then is gone"
    else:
        differs = next(sides.tokens.differences(TokenTable.read(place, sides.option)), "")
    if differs:
        fix = f"give {place}" if place is not None else "put it back"
        yield f"{sides.tokens.name} is not what {sides.checkpoint} was trained with: {differs}: {fix}"


def the_model_is_that_of_the_weights(sides: Sides) -> Iterator[str]:
    """A recipe describes the model that a folder or a checkpoint holds."""
    if not sides.recipe:
        return
    if sides.option == "init.huggingface" and sides.folder is not None:
        yield from differences(sides.model, read_config(sides.folder, sides.option), sides.folder)
    if sides.checkpoint is None:
        return
    held = asdict(model_of(read_run_state(sides.checkpoint)))
    for part in ("text", "vision"):
        for key, value in asdict(sides.model)[part].items():
            if held[part][key] != value and key not in NOT_THE_MODEL:
                fix = (
                    "set run.name to start a new run"
                    if sides.option == "run.folder"
                    else "set it alike"
                )
                yield f"model.{part}.{key}={value}, but {sides.checkpoint} holds another model, with {held[part][key]}: {fix}"


def pixels_are_those_of_the_data(sides: Sides) -> Iterator[str]:
    """The folder's preprocessors cut, scale and normalise pixels as is done here; their bounds may be others (see serving.py)."""
    nested = sides.read(PROCESSOR)
    said: dict[str, Mapping[str, Any]] = {
        name: sides.read(name) for name in (PREPROCESSOR, VIDEO_PREPROCESSOR)
    }
    said |= {
        f"{PROCESSOR} ({part})": _section(nested, part)
        for part in ("image_processor", "video_processor")
    }
    for name, content in said.items():
        for key, value in PIXELS.items():
            if content.get(key) is not None and not _same(content[key], value):
                yield (
                    f"{sides.where(name)} has {key} {content[key]}, but pictures are prepared with {value}, as for every Qwen3-VL"
                    " model: put back the file that the weights came with"
                )


AGREEMENTS: Final[tuple[Callable[[Sides], Iterator[str]], ...]] = (
    the_model_is_that_of_the_weights,
    every_token_has_a_row,
    adapted_tokens_have_trained_rows,
    special_tokens_are_there,
    a_tokenizer_says_one_thing,
    the_tokenizer_is_that_of_the_weights,
    the_tokenizer_is_that_of_training,
    vision_tokens_are_alike,
    answers_end_alike,
    pixels_are_those_of_the_data,
)


def _with(base: Sides, option: str, place: Path) -> Sides:
    """The same sides with a Hugging Face folder or a checkpoint as the weights' one."""
    stored = (place / STATE).is_file()
    folder = next(iter(companions_of(place)), None) if stored else place
    return replace(base, option=option, folder=folder, checkpoint=place if stored else None)


def _is_trained(sides: Sides) -> bool:
    """Whether the checkpoint itself says which tokenizer it was trained with, so that it need not be asked what lies beside it."""
    return sides.checkpoint is not None and bool(tokenizer_hash(read_run_state(sides.checkpoint)))


def _newest(run_folder: Path) -> Path | None:
    """The checkpoint that a run's `latest` names, if it is there and says where the run stands; damage is reported later."""
    pointer = run_folder / LATEST
    try:
        newest = locate(
            pointer.parent,
            read_located(pointer.parent, pointer.name, LONGEST_POINTER).decode().strip(),
            "folder",
        )
        read_run_state(newest)
    except (
        PlaceError,
        OSError,
        UnicodeDecodeError,
        UserError,
    ):  # checkpoints can be read without it
        return None
    return newest


def _section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a JSON object that is an object itself; empty if it is not there."""
    part = content.get(name)
    return part if isinstance(part, dict) else {}


def _same(said: Any, value: Any) -> bool:
    """Whether two settings are equal, numbers nearly; one number stands for three alike."""
    if isinstance(value, list):
        items = said if isinstance(said, list) else [said] * len(value)
        return len(items) == len(value) and all(
            _same(one, other) for one, other in zip(items, value, strict=True)
        )
    if isinstance(value, bool) or not isinstance(said, int | float):
        return bool(said == value)
    return abs(said) < 1e300 and isclose(said, value, rel_tol=1e-4)
