"""Numbers in free text, as exact fractions.

Signs of other scripts and LaTeX are first written plainly; then one grammar reads all numbers.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Final

from visionloom.data.encode.scores import FULL_WIDTH

MOST_DIGITS: Final = 200
"""Of a part of a number that is read: a policy may write digits until its limit."""
MOST_POWER: Final = 999
"""Digits of a base times its exponent."""
LETTERS: Final = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u04ff"
"""Latin, Greek and Cyrillic, which write units and names; Chinese and Japanese are written next to numbers without a space."""
BOXED: Final = re.compile(
    r"\\boxed\s*\{((?:[^{}]++|\{(?:[^{}]++|\{(?:[^{}]++|\{[^{}]*+\})*+\})*+\})*+)\}"
)
"""LaTeX's mark of an answer, with up to three levels of braces in it."""
ASCII: Final = FULL_WIDTH | {0xFF0C: ";"}
"""Between other digits than those of its own width a wide comma parts numbers."""
SUPERSCRIPT: Final = re.compile(r"[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
VULGAR: Final = re.compile(r"[\u00bc-\u00be\u2150-\u215e]")
"""Fractions that are one character."""
PLAIN: Final = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"(?<=[\uff10-\uff19])\uff0c(?=[\uff10-\uff19])", ","),
        (r"[\u2010\u2011\u2013\u2212]", "-"),
        (r"\u2044", "/"),
        (r"\\!", ""),
        (r"\{,\}", ","),
        (r"\\[,;: ]", "\u202f"),
        (r"~", " "),  # about, or from one number to another
        (r"\\(?:text|mathrm|mathbf|textbf|mathit|operatorname)\s*\{([^{}]*)\}", r"\1"),
        (r"\\([%$#&_])", r"\1"),
        (r"\^\s*\{?\s*\\circ\s*\}?", "\u00b0"),
        (r"\\times(?![A-Za-z])", "\u00d7"),
        (r"\\cdot(?![A-Za-z])", "\u00b7"),
        (r"([\^_])\s*[{(]\s*([-+]?\w+)\s*[)}]", r"\1\2"),
        # the space makes 3\frac{1}{2} a mixed number
        (r"(?<=\d)\s*(?=\\[cdt]?frac(?![a-z]))", " "),
        (r"\\[cdt]?frac\s*([1-9])\s*([1-9])", r"\1/\2"),
        (r"\\[cdt]?frac\s*\{\s*([-+]?[\d.,]+)\s*\}\s*\{?\s*([\d.,]+)\s*\}?", r"\1/\2"),
        (r"\\[A-Za-z]+", " "),
        (r"([=\u2248])\s*([-+])\s+(?=[\d.$])", r"\1\2"),
        # Dates, times and versions have digits and are no numbers: only their last part would be compared.
        (
            r"(?<!\d)(?:\d{1,4}/\d{1,2}/\d{1,4}(?![\d/])|\d{4}-\d{1,2}-\d{1,2}(?!\d)|\d{1,2}-\d{1,2}-\d{4}(?!\d)"
            # with a month and a day in Chinese or Japanese
            r"|(?:\d++年)?\d++月\d++日|\d++(?::\d++)+(?:\.\d++)?|\d++(?:\.\d++){2,})",
            ";",
        ),
    )
)
"""What is written plainly, in this order: signs, LaTeX, then what only looks like a number."""
WHOLE: Final = r"(?:\d{1,3}(?:[,\u00a0\u202f]\d{3})+(?!\d)|\d+)"
NUMBER: Final = re.compile(
    # neither a hyphen nor a range, and no bullet of a list, which a space follows
    rf"(?P<sign>(?<![{LETTERS}\d_^)\]}}%])[-+])?"
    r"(?P<currency>[$\u00a3\u00a5\uffe5\u20a0-\u20bf]\s?)?"
    rf"(?:(?P<mixed>{WHOLE})[ \t\u00a0\u202f]+(?=\d+\s?/\s?\d))?"
    rf"(?:(?P<whole>{WHOLE})(?:\.(?P<decimals>\d+))?|(?<![{LETTERS}\d])\.(?P<part>\d+))"
    r"(?:(?:[eE]|\s?[\u00d7xX*\u00b7]\s?10\^)(?P<exponent>[-+]?\d{1,3})(?!\d)"
    r"|\^(?P<power>[-+]?\d{1,3})(?!\d|\.\d))?"
    rf"(?:\s?/\s?(?P<divisor>{WHOLE}(?:\.\d+)?))?"
    r"(?P<percent>\s?(?:%|(?i:per\s?cent)(?![A-Za-z])|パーセント))?"
)
"""A sign, the whole part of a mixed number, a decimal with thousands separators, a power of ten or of itself, a divisor, a percent sign."""
GLUED: Final = re.compile(rf"[{LETTERS}_^][-+]?\Z")
"""Before digits of a unit or a name, as in cm^2, CO2, image2 and COVID-19."""


class Percentage(Fraction):
    """A number that was written with a percent sign: a hundredth of what stands before it."""


def numbers_in(text: str) -> list[Fraction]:
    r"""Return the numbers of a text in their order, of its last \boxed{} alone where there is one.

    Digits that belong to a word or a unit are numbers only where there are no others.
    """
    boxed = BOXED.findall(text)
    text = plain(boxed[-1] if boxed else text)
    free, glued = list[Fraction](), list[Fraction]()
    for match in NUMBER.finditer(text):
        number = _value(match)
        start = match.start()
        if number is not None:
            is_glued = GLUED.search(text[max(0, start - 2) : start])
            (glued if is_glued else free).append(number)
    return free or glued


def plain(text: str) -> str:
    """Return a text with its numbers in ASCII and without LaTeX, dates and times."""
    text = SUPERSCRIPT.sub(lambda power: "^" + _compatible(power[0]), text)
    text = VULGAR.sub(
        lambda fraction: rf"\frac{{{_compatible(fraction[0])}}}".replace("\u2044", "}{"), text
    )
    first, *others = PLAIN
    text = first[0].sub(first[1], text).translate(ASCII)
    for pattern, replacement in others:
        text = pattern.sub(replacement, text)
    return text


def _compatible(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _value(match: re.Match[str]) -> Fraction | None:
    """Return a number of NUMBER; None if it has too many digits or divides by zero."""
    parts = match.groupdict(default="")
    part = {name: re.sub(r"[,\u00a0\u202f]", "", text) for name, text in parts.items()}
    if max(map(len, part.values())) > MOST_DIGITS:
        return None
    number = _magnitude(part)
    if number is None:
        return None
    if part["sign"] == "-":
        number = -number
    return Percentage(number / 100) if part["percent"] else number


def _magnitude(part: dict[str, str]) -> Fraction | None:
    """Return a number by its parts, without sign; None for a division by zero or too high a power."""
    number = Fraction(f"{part['whole'] or 0}.{part['decimals'] or part['part'] or 0}")
    number *= Fraction(10) ** int(part["exponent"] or 0)
    power, divisor = int(part["power"] or 1), Fraction(part["divisor"] or 1)
    is_large = abs(power) * len(part["whole"]) > MOST_POWER
    if is_large or not divisor or (power < 0 and not number):
        return None
    return int(part["mixed"] or 0) + number**power / divisor
