"""Check that model, tokenizer, Hugging Face folder and checkpoint agree, before anything is trained or converted.

Each agreement is a function that yields a line for each fault, naming both sides and the fix; AGREEMENTS lists them all.
Nothing here imports torch.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isclose
from pathlib import Path
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.data.encode.tokenizer import END_OF_TEXT, REQUIRED
from visionloom.model.huggingface.config import (
    CONFIG,
    NOT_THE_MODEL,
    TOKENS,
    differences,
    read_config,
    read_json,
)
from visionloom.model.huggingface.part_config import (
    part_differences,
    read_language_config,
    read_tower_config,
)
from visionloom.model.huggingface.peft_config import read_adapter_config
from visionloom.train.agreement_sides import (
    Sides,
    newest_checkpoint,
    section_of,
    sides_with,
    with_first_weights,
)
from visionloom.train.checkpoint.state_file import model_of, read_run_state
from visionloom.train.config import RunConfig
from visionloom.train.exchange.companions import (
    GENERATION,
    PREPROCESSOR,
    PROCESSOR,
    VIDEO_PREPROCESSOR,
    tokenizer_hash,
    tokenizer_of,
)
from visionloom.train.exchange.serving import PIXELS
from visionloom.train.exchange.token_table import SETTINGS, STOPS, TOKENIZER, TokenTable

ROWS: Final = 128
"""Rows of a vocabulary are best a multiple of this: it divides by any number of tensor ranks."""
NEARLY: Final = 1e-4
"""Relative difference of two equal settings: files round 1/255 in different ways."""


def check_run(config: RunConfig, checkpoint: str = "") -> None:
    """Refuse a run whose parts do not agree.

    Args:
        config: the run's.
        checkpoint: one that is to be evaluated; empty: the newest of the run, if there is one.

    Raises:
        UserError: one line for each disagreement.
    """
    newest = None if checkpoint else newest_checkpoint(Path(config.run.folder))
    resuming = newest is not None and config.data.on_change == "new_phase"
    base = Sides.of_run(config, resuming)
    if config.lora.adapter:
        read_adapter_config(Path(config.lora.adapter), config.lora)
    # Each folder of weights by itself: a tower and a language model may come from two.
    compared = with_first_weights(base, config.init)
    option, folder = ("checkpoint", Path(checkpoint)) if checkpoint else ("run.folder", newest)
    if folder is not None:
        compared.append(sides_with(base, option, folder))
    if lines := [line for sides in compared for line in faults(sides)]:
        # Once each: both may disagree with the same tokenizer.
        raise UserError(*dict.fromkeys(lines))


def check_folder(folder: Path, option: str) -> None:
    """Refuse a Hugging Face folder whose files do not agree with each other.

    Raises:
        UserError: one line for each disagreement.
    """
    tokens = TokenTable.read(folder, option) if (folder / TOKENIZER).is_file() else None
    model = read_config(folder, option)
    vocabulary = f"{folder}/{CONFIG} with vocab_size {model.text.vocab_size}"
    sides = Sides(model, vocabulary, tokens, option, folder, recipe=False)
    if lines := faults(sides):
        raise UserError(*lines)


def check_export(checkpoint: Path, source: Path | None, option: str) -> None:
    """Refuse to put files into an export that do not agree with its checkpoint.

    Args:
        checkpoint: to export.
        source: folder or checkpoint that files are taken from; None: the checkpoint's own run.
        option: that names `source`.

    Raises:
        UserError: one line for each disagreement.
    """
    if lines := faults(Sides.of_export(checkpoint, source, option)):
        raise UserError(*lines)


def faults(sides: Sides) -> list[str]:
    """Return all disagreements, a line each."""
    lines: list[str] = []
    for agreement in AGREEMENTS:
        lines += agreement(sides)
    return list(dict.fromkeys(lines))  # two files may say the same


# ---- the agreements


def every_token_has_a_row(sides: Sides) -> Iterator[str]:
    """Compare the highest id of the tokenizer with the rows of the embedding.

    Beyond its rows a rank would read past its table, or, where tensor ranks share it, take zeros for tokens that none of them has.
    """
    if sides.tokens is None:
        return
    token, last = sides.tokens.last
    rows = sides.model.text.vocab_size
    if last < rows:
        return
    fix = "give the tokenizer of these weights"
    if sides.recipe and sides.checkpoint is None:
        # Enough for the tokenizer, rounded up, and for the rows that the folder has.
        enough = -(-(last + 1) // ROWS) * ROWS
        held = sides.text.get("vocab_size")
        if isinstance(held, int):
            enough = max(enough, held)
        fix = (
            f"set model.text.vocab_size={enough}, or give the tokenizer that the model was made for"
        )
    yield (
        f"{sides.tokens.name} has ids up to {last} ({token}),"
        f" but {sides.vocabulary} has rows for 0 to {rows - 1} only: {fix}"
    )


def adapted_tokens_have_trained_rows(sides: Sides) -> Iterator[str]:
    """Compare the tokenizer with the folder's rows: those it lacks are zeros, which adapters never train."""
    if sides.tokens is None or not sides.adapters or sides.option != "init.huggingface":
        return
    token, last = sides.tokens.last
    rows = sides.text.get("vocab_size")
    if isinstance(rows, int) and rows <= last < sides.model.text.vocab_size:
        yield (
            f"{sides.tokens.name} has ids up to {last} ({token}),"
            f" but {sides.where(CONFIG)} has {rows} rows, and lora.rank trains none:"
            " give the folder's own tokenizer, or train all weights with lora.rank=0"
        )


def special_tokens_are_there(sides: Sides) -> Iterator[str]:
    """Look for the tokens that prompts are made of in the tokenizer of a run."""
    if sides.tokens is None or not sides.recipe:
        return
    missing = [token for token in REQUIRED if token not in sides.tokens.ids]
    if missing:
        yield f"{sides.tokens.name} lacks special tokens of Qwen3-VL: {' '.join(missing)}"


def a_tokenizer_says_one_thing(sides: Sides) -> Iterator[str]:
    """Compare tokenizer_config.json and added_tokens.json with tokenizer.json, the only one that is read here."""
    if sides.tokens is None:
        return
    table = sides.tokens
    for token, number in _ids_beside(table).items():
        if table.ids.get(token) != number:
            has = f"has it as {table.ids[token]}" if token in table.ids else "lacks it"
            yield (
                f"{table.name}: {SETTINGS} or added_tokens.json says {token} is {number},"
                f" but {TOKENIZER} {has}: save the tokenizer anew"
            )
            return


def _ids_beside(table: TokenTable) -> dict[str, Any]:
    """Return the ids of added tokens in the files beside a tokenizer.json."""
    ids: dict[str, Any] = {}
    for key, added in section_of(table.settings, "added_tokens_decoder").items():
        # Digits of an id: nothing that int() reads in other scripts, or for long.
        is_id = key.isascii() and key.isdigit() and len(key) < 10
        if is_id and isinstance(added, dict):
            ids[str(added.get("content"))] = int(key)
    path = table.folder / "added_tokens.json"
    if path.is_file():
        option, _, _ = table.name.partition("=")
        ids |= read_json(path, option)
    return ids


@dataclass(frozen=True)
class AnswerEnds:
    """The tokens that end answers in training, which other files must name too."""

    tokens: TokenTable
    stops: dict[int, str]
    """Those of STOPS that the tokenizer has, by id."""

    @classmethod
    def of(cls, tokens: TokenTable) -> "AnswerEnds":
        """Return those of a tokenizer."""
        added = tokens.added
        return cls(tokens, {added[stop]: stop for stop in STOPS if stop in added})

    def __str__(self) -> str:
        return " or ".join(f"{number} ({stop})" for number, stop in self.stops.items())

    def end_faults(self, where: str, settings: Mapping[str, Any]) -> Iterator[str]:
        """Yield a line if a model's settings, from the file `where`, end answers with other ids."""
        ends = settings.get("eos_token_id")
        each_end = ends if isinstance(ends, list) else [ends]
        # A list, not the dict: what a file says may not be hashable.
        if ends is not None and any(end not in list(self.stops) for end in each_end):
            yield (
                f"{where} has eos_token_id {ends},"
                f" but with {self.tokens.name} answers end with {self}:"
                " correct the file, or give the tokenizer of these weights"
            )

    def pad_faults(self, where: str, settings: Mapping[str, Any]) -> Iterator[str]:
        """Yield a line if a model's settings, from the file `where`, pad with no special token."""
        pad, added = settings.get("pad_token_id"), self.tokens.added
        if pad is not None and pad not in added.values():
            yield (
                f"{where} has pad_token_id {pad},"
                f" but {self.tokens.name} pads with {added.get(END_OF_TEXT)}"
                f" and has no special token {pad}:"
                " correct the file, or give the tokenizer of these weights"
            )

    def tokenizer_faults(self) -> Iterator[str]:
        """Yield a line if the tokenizer's own settings end answers with another token."""
        end = self.tokens.settings.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        if end is not None and end not in self.stops.values():
            yield (
                f"{self.tokens.name}: {SETTINGS} has eos_token {end},"
                f" but answers end with {self}: correct the file"
            )


def answers_end_alike(sides: Sides) -> Iterator[str]:
    """Compare the tokens that end answers in training with those in generation and in the tokenizer's settings."""
    if sides.tokens is None:
        return
    ends = AnswerEnds.of(sides.tokens)
    if not ends.stops:
        return
    # Trainers write these ids next to text_config, where transformers looks too if there is no generation_config.json.
    for name, settings in (
        (GENERATION, sides.read(GENERATION)),
        (CONFIG, sides.text),
        (CONFIG, sides.read(CONFIG)),
    ):
        yield from ends.end_faults(sides.where(name), settings)
        yield from ends.pad_faults(sides.where(name), settings)
    yield from ends.tokenizer_faults()


def vision_tokens_are_alike(sides: Sides) -> Iterator[str]:
    """Compare the ids of pictures, videos, and the beginning and end of both in config.json and the tokenizer."""
    if sides.tokens is None or sides.resuming:
        return
    config = sides.read(CONFIG)
    for key, spelling in TOKENS.items():
        said, has = config.get(key), sides.tokens.ids.get(spelling)
        if said is not None and has is not None and said != has:
            yield (
                f"{sides.where(CONFIG)} has {key} {said},"
                f" but {sides.tokens.name} has {spelling} as {has}:"
                " give the tokenizer of these weights, or correct config.json"
            )


def the_tokenizer_is_that_of_the_weights(sides: Sides) -> Iterator[str]:
    """Compare the tokenizer with the one in the weights' folder."""
    if sides.tokens is None or sides.folder is None:
        return
    if not (sides.folder / TOKENIZER).is_file():
        return
    # A checkpoint that names its tokenizer is compared with that one, below.
    if sides.checkpoint is not None and tokenizer_hash(read_run_state(sides.checkpoint)):
        return
    theirs = TokenTable.read(sides.folder, sides.option)
    for difference in () if sides.resuming else sides.tokens.differences(theirs):
        yield (
            f"{sides.tokens.name} is not the tokenizer beside the weights, {sides.where(TOKENIZER)}:"
            f" {difference}: give that folder as the tokenizer"
        )


def the_tokenizer_is_that_of_training(sides: Sides) -> Iterator[str]:
    """Compare the tokenizer with the one that a checkpoint was trained with."""
    if sides.tokens is None or sides.checkpoint is None or sides.resuming:
        return
    run_state = read_run_state(sides.checkpoint)
    known = tokenizer_hash(run_state)
    if not known or sides.tokens.hash.startswith(known):
        return
    place = tokenizer_of(sides.checkpoint, run_state)
    if place is not None:
        trained = TokenTable.read(place, sides.option)
        differs = next(sides.tokens.differences(trained), "")
        fix = f"give {place}"
    elif sides.option == "hf":
        return  # the user names one because that of training is gone
    else:
        differs = (
            f"its tokenizer.json had the SHA-256 {known[:8]}, this one has {sides.tokens.hash[:8]},"
            " and the one of then is gone"
        )
        fix = "put it back"
    if differs:
        yield (
            f"{sides.tokens.name} is not what {sides.checkpoint} was trained with: {differs}: {fix}"
        )


def the_model_is_that_of_the_folder(sides: Sides) -> Iterator[str]:
    """Compare a recipe's model with the one of the Hugging Face folder that it begins with, or with the folder's part of it."""
    ours, folder, option = sides.model, sides.folder, sides.option
    if not sides.recipe or folder is None:
        return
    if option == "init.huggingface":
        yield from differences(ours, read_config(folder, option), folder)
    if option == "init.language":
        theirs = read_language_config(folder, option, ours)
        yield from part_differences(ours, theirs, "text", folder)
    if option == "init.vision":
        theirs = read_tower_config(folder, option, ours)
        yield from part_differences(ours, theirs, "vision", folder)


def the_model_is_that_of_the_checkpoint(sides: Sides) -> Iterator[str]:
    """Compare a recipe's model with the one that a checkpoint holds."""
    if not sides.recipe or sides.checkpoint is None:
        return
    fix = "set it alike"
    if sides.option == "run.folder":
        fix = "set run.name to start a new run"
    ours = asdict(sides.model)
    theirs = asdict(model_of(read_run_state(sides.checkpoint)))
    for part in ("text", "vision"):
        for key, value in ours[part].items():
            held = theirs[part][key]
            if held != value and key not in NOT_THE_MODEL:
                yield (
                    f"model.{part}.{key}={value}, but {sides.checkpoint} holds another model,"
                    f" with {held}: {fix}"
                )


def pixels_are_those_of_the_data(sides: Sides) -> Iterator[str]:
    """Compare how the folder's preprocessors cut, scale and normalise pixels with how it is done here.

    Their bounds may be others (see serving.py).
    """
    nested = sides.read(PROCESSOR)
    files = {
        PREPROCESSOR: sides.read(PREPROCESSOR),
        VIDEO_PREPROCESSOR: sides.read(VIDEO_PREPROCESSOR),
    }
    for part in ("image_processor", "video_processor"):
        files[f"{PROCESSOR} ({part})"] = section_of(nested, part)
    for name, content in files.items():
        for key, value in PIXELS.items():
            said = content.get(key)
            if said is not None and not _same(said, value):
                yield (
                    f"{sides.where(name)} has {key} {said}, but pictures are prepared with {value},"
                    " as for every Qwen3-VL model: put back the file that the weights came with"
                )


AGREEMENTS: Final[tuple[Callable[[Sides], Iterator[str]], ...]] = (
    the_model_is_that_of_the_folder,
    the_model_is_that_of_the_checkpoint,
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


def _same(said: Any, value: Any) -> bool:
    """Return whether two settings are equal, numbers nearly; one number stands for three alike."""
    if isinstance(value, list):
        items = said if isinstance(said, list) else [said] * len(value)
        if len(items) != len(value):
            return False
        return all(_same(one, other) for one, other in zip(items, value, strict=True))
    if isinstance(value, bool) or not isinstance(said, int | float):
        return bool(said == value)
    return abs(said) < 1e300 and isclose(said, value, rel_tol=NEARLY)
