"""Scripts that texts are written in, and their words."""

import re
from collections import Counter
from typing import Final

from visionloom.data.filter.measures import scripts

ENOUGH: Final = 8
"""Letters from which on a text is said to use a script: fewer are a name, a unit or the letter of a choice."""
LETTERS_OF_A_SIGN: Final = 3
"""Letters of an alphabet that a Chinese, Japanese or Korean character stands for."""
TOGETHER: Final = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff"
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese, which have no spaces between words."""
SPACELESS: Final = re.compile(f"[{TOGETHER}]")
WORD: Final = re.compile(rf"[{TOGETHER}]|[^\s{TOGETHER}]+")
NO_PROSE: Final = re.compile(
    r"(?s)```.*?(?:```|\Z)|`[^`\n]*`"  # code and fenced JSON
    r"|</?[a-z_]+>"  # marks of thoughts and tools
    r'|"label"\s*:\s*"[^"\n]*"|"[^"\n]*"\s*:'  # names of things are the reference's matter
    r"|\\[A-Za-z]+"
    r"|https?://[!-~]+"
    r"|(?<![^\W_])[A-Za-z](?![^\W_])"  # variables
)
"""What is written alike in every language."""
TURN: Final = re.compile(r"(?ms)^user: (.*?)(?=^(?:system|user|assistant|tool): |\Z)")
"""Of the user, in a question of several turns."""


def last_turn(question: str) -> str:
    """Return what the user has said last, of a question as `predictions.question_text` writes it."""
    turns = TURN.findall(question)
    return turns[-1] if turns else question


def letters_by_script(text: str) -> Counter[str]:
    """Count the letters of a text's prose by script, the first word of their Unicode names."""
    letters = scripts(NO_PROSE.sub(" ", text))
    for script in ("CJK", "HANGUL"):
        letters[script] *= LETTERS_OF_A_SIGN
    return +letters


def words_of(text: str) -> list[str]:
    """Return the words of a text, each character of a script without spaces as one."""
    return WORD.findall(text.casefold())
