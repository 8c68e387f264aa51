"""`data.py filter SRC DST`: keep the samples whose question, answer and pass rate are within bounds; write down the others and why."""

import argparse
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionloom.common.errors import UserError
from visionloom.common.text import say
from visionloom.launch.data_commands.progress import bars

if TYPE_CHECKING:
    from visionloom.data.filter.rules import FilterRules

LENGTHS = {
    "min-question": "fewest characters of what users wrote",
    "max-question": "most characters of what users wrote",
    "min-answer": "fewest characters of the last answer, without thoughts",
    "max-answer": "most characters of the last answer, without thoughts",
    "max-thoughts": "most characters of its thoughts",
}
SHARES = {
    "max-repetition": "largest share of runs of eight words that were there before",
    "max-mismatch": "largest share of letters of scripts that the question does not have",
    "min-pass-rate": "smallest share of right answers in --rollouts",
    "max-pass-rate": "largest share of right answers in --rollouts",
}
PATTERNS = {
    "answers-like": "keep only answers in which this regular expression is found",
    "answers-unlike": "leave out answers in which this regular expression is found",
}


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser("filter", help="keep the samples that are within bounds")
    parser.add_argument("source", type=Path, metavar="SRC")
    parser.add_argument("target", type=Path, metavar="DST")
    for name, text in LENGTHS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    for name, text in SHARES.items():
        parser.add_argument(f"--{name}", type=float, metavar="SHARE", help=text)
    for name, text in PATTERNS.items():
        parser.add_argument(f"--{name}", metavar="REGEX", help=text)
    parser.add_argument(
        "--rollouts", type=Path, metavar="DIR", help="a model's answers, of launch/generate.py"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Filter, and print how many samples each rule left out."""
    from visionloom.data.filter.run import Filtering, filter_dataset, pass_rates_of
    from visionloom.data.shards.dataset import Dataset

    # Wrong words first: opening a dataset may take a moment.
    rules = rules_of(options)
    source = Dataset.open(options.source, "SRC", "filter")
    pass_rates: dict[str, float] = {}
    if options.rollouts is not None:
        pass_rates = pass_rates_of(Dataset.open(options.rollouts, "rollouts", "filter"))
    filtering = Filtering(source, rules, pass_rates)
    with bars() as progress:
        filter_dataset(filtering, options.target, progress)
    say_counts(filtering.counts, options.target)


def say_counts(counts: Counter[str], target: Path) -> None:
    """Print how many samples are kept, and how many each rule left out."""
    from visionloom.data.filter.run import LEFT_OUT

    say(f"{target}: {counts['']} of {counts.total()} samples kept")
    reasons = [(reason, number) for reason, number in counts.most_common() if reason]
    for reason, number in reasons:
        say(f"  {number} left out: {reason}")
    if reasons:
        say(f"  which they are: {target / LEFT_OUT}")


def rules_of(options: argparse.Namespace) -> "FilterRules":
    """Return the rules that the words describe.

    Raises:
        UserError: naming a bound that cannot be, an expression that is none, or pass rates without answers.
    """
    from visionloom.data.filter.rules import FilterRules

    values: dict[str, Any] = {}
    # argparse has turned the dashes of a word into underscores, as the fields have them.
    for word in (*LENGTHS, *SHARES, *PATTERNS):
        name = word.replace("-", "_")
        given = getattr(options, name)
        if word in PATTERNS:
            values[name] = pattern_of(word, given)
        else:
            check_bound(word, given)
            values[name] = given

    rules = FilterRules(**values)
    if rules.needs_pass_rates and options.rollouts is None:
        raise UserError(
            "--min-pass-rate and --max-pass-rate need --rollouts DIR: a model's answers"
        )
    if rules == FilterRules():
        raise UserError("no rule is given: see python launch/data.py filter --help")
    return rules


def check_bound(word: str, value: float | None) -> None:
    """Refuse a number below 0, and a share above 1."""
    if value is None:
        return
    if word in SHARES and not 0 <= value <= 1:
        raise UserError(f"--{word} {value:g}: a share of 0 to 1 expected")
    if value < 0:
        raise UserError(f"--{word} {value:g}: at least 0 expected")


def pattern_of(word: str, text: str | None) -> re.Pattern[str] | None:
    """Return a word's regular expression; UserError if it is none."""
    if text is None:
        return None
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"--{word} {text}: no regular expression: {error}") from None
