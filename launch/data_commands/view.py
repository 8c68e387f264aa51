"""`data.py view DIR [KEY|INDEX ...]`: samples as one web page or PNG: pictures, boxes, frames, tokens, packs."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from visionloom.common.errors import UserError
from visionloom.common.text import say
from visionloom.launch.data_commands.arguments import add_chat_format, add_media
from visionloom.launch.data_commands.lengths import media_config

if TYPE_CHECKING:
    from visionloom.data.inspect.sample_view import FirstPacks, SampleView


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "view", help="samples as one web page or PNG: pictures, boxes, frames, tokens, packs"
    )
    parser.add_argument("folder", metavar="DIR", help="folder of a dataset")
    parser.add_argument(
        "samples", nargs="*", metavar="KEY|INDEX", help="which samples (default: the first ones)"
    )
    parser.add_argument(
        "--count", type=int, default=12, help="how many of the first samples (default 12)"
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="show tokens, coloured by their weight in the loss"
    )
    add_media(parser)
    add_chat_format(parser)
    parser.add_argument(
        "--pack", type=int, metavar="LENGTH", help="show the first packs of so many tokens as bars"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("view.html"),
        help="FILE.html or FILE.png (default view.html)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the page or the picture."""
    from visionloom.data.encode.tokenizer import Tokenizer
    from visionloom.data.inspect.contact_sheet import draw_samples
    from visionloom.data.inspect.sample_view import find_samples, first_packs, view_sample
    from visionloom.data.shards.dataset import Dataset

    _check(options)
    name = Path(options.folder.rstrip("/")).name or "dataset"
    dataset, rules = Dataset.open(options.folder, name), media_config(options.media)
    tokenizer = None
    if options.tokenizer:
        tokenizer = Tokenizer(options.tokenizer, options.chat_format)
    indices = find_samples(dataset, options.samples, options.count)
    title = f"{dataset.name}: {len(indices):,} of {len(dataset):,} samples"
    is_picture = options.out.suffix == ".png"
    shown_with = None if is_picture else tokenizer  # a picture shows no tokens
    samples = (view_sample(dataset, index, rules, shown_with) for index in indices)
    if is_picture:
        draw_samples(list(samples), title, options.out)
    else:
        packs = None
        if options.pack and tokenizer:
            packs = first_packs(dataset, tokenizer, rules, options.pack, options.count)
        write_page(options, title, samples, packs)
    say(f"{options.out}: {title}")


def _check(options: argparse.Namespace) -> None:
    """Refuse words that no page or picture can be made by."""
    is_picture = options.out.suffix == ".png"
    if options.out.suffix != ".html" and not is_picture:
        raise UserError(f"--out {options.out}: a name ending in .html or .png expected")
    if options.count < 1:
        raise UserError(f"--count {options.count}: at least 1 expected")
    if options.pack is None:
        return
    # Packs are bars under the samples, which a picture has no room for.
    if options.pack < 1 or not options.tokenizer or is_picture:
        raise UserError(
            "--pack LENGTH: a number of tokens, with --tokenizer FOLDER and a page (.html), expected"
        )


def write_page(
    options: argparse.Namespace,
    title: str,
    samples: "Iterable[SampleView]",
    packs: "FirstPacks | None",
) -> None:
    """Write the page, and say which samples its packs lack."""
    from visionloom.data.inspect.page import page

    # Sample by sample: a page of thousands does not hold their pictures at once.
    options.out.write_text(page(title, str(options.folder), samples, packs))
    if packs:
        say(
            f"packs: {packs.left_out:,} of the first {packs.tried:,} samples are too long or cannot be rendered"
        )
