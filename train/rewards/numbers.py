"""Numbers in free text, as exact fractions."""

import re
from fractions import Fraction
from typing import Final

MOST_DIGITS: Final = 200
"""Of a number that is read: a policy may write digits until its limit."""
NUMBER: Final = re.compile(
    r"(?P<sign>(?<![\d)\]])[-+\u2212]\s?)?(?P<currency>[$\u20ac\u00a3\u00a5]\s?)?"
    r"(?:\\d?frac\{(?P<top>\d+)\}\{(?P<bottom>\d+)\}"
    r"|(?P<whole>\d{1,3}(?:[,\u00a0\u202f]\d{3})+(?![\d])|\d+)?(?P<decimals>\.\d+)?"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3}))?"
    r"(?:\s?/\s?(?P<divisor>\d+))?)(?P<percent>\s?\\?%)?"
)
"""With thousands separators, as a decimal, a fraction (also LaTeX's), a power of ten or a percentage."""
MIXED: Final = re.compile(r"(?<![\d.,/])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d.,/])")
"""As in 2 1/2."""


def numbers_in(text: str) -> list[Fraction]:
    """Return the numbers of a text in their order; a percentage is a hundredth of its number."""
    text = MIXED.sub(lambda match: _improper(*map(int, match.groups())), text)
    numbers = []
    for match in NUMBER.finditer(text):
        if (number := _value(match)) is not None:
            numbers.append(number)
    return numbers


def _improper(whole: int, top: int, bottom: int) -> str:
    return f"{whole * bottom + top}/{bottom}"


def _value(match: re.Match[str]) -> Fraction | None:
    """Return a number of NUMBER; None if there are no digits, too many, or a division by zero."""
    part = match.groupdict()
    if part["top"] is not None:
        number = _ratio(part["top"], part["bottom"])
    else:
        digits = re.sub(r"\D", "", part["whole"] or "") + (part["decimals"] or "")
        if not digits or len(digits) > MOST_DIGITS or len(part["divisor"] or "") > MOST_DIGITS:
            return None
        number = Fraction(digits) * Fraction(10) ** int(part["exponent"] or 0)
        if part["divisor"] is not None:
            divisor = int(part["divisor"])
            number = number / divisor if divisor else None
    if number is None:
        return None
    if part["percent"]:
        number /= 100
    return -number if (part["sign"] or "").strip() in ("-", "\u2212") else number


def _ratio(top: str, bottom: str) -> Fraction | None:
    if len(top) + len(bottom) > MOST_DIGITS or not int(bottom):
        return None
    return Fraction(int(top), int(bottom))
