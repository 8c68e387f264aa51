"""The rules of a filter: each says in a few words why a sample is left out. Imports no torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from visionloom.data.filter.measures import (
    language_mismatch,
    last_answer,
    question_of,
    repetition,
    text_of,
    thoughts_of,
)
from visionloom.data.shards.sample import Message, Sample


@dataclass(frozen=True)
class FilterRules:
    """Bounds of a chat's question and last answer; None: no such rule. Documents pass all rules but those of pass rates."""

    min_question: int | None = None
    """Fewest characters of what users wrote."""
    max_question: int | None = None
    """Most characters of what users wrote."""
    min_answer: int | None = None
    """Fewest characters of the last answer, without thoughts."""
    max_answer: int | None = None
    """Most characters of the last answer, without thoughts."""
    max_thoughts: int | None = None
    """Most characters of the last answer's thoughts."""
    max_repetition: float | None = None
    """Largest share of repeated runs of words in answer or thoughts."""
    max_mismatch: float | None = None
    """Largest share of letters, in answer and thoughts, of scripts that the question does not have."""
    answers_like: re.Pattern[str] | None = None
    """Only answers in which this is found."""
    answers_unlike: re.Pattern[str] | None = None
    """No answers in which this is found."""
    min_pass_rate: float | None = None
    """Smallest share of right answers among those that a model gave."""
    max_pass_rate: float | None = None
    """Largest share of right answers among those that a model gave: beyond it a question teaches nothing."""

    @property
    def needs_pass_rates(self) -> bool:
        """Return whether a rule compares pass rates."""
        return self.min_pass_rate is not None or self.max_pass_rate is not None

    def reason(self, sample: Sample, pass_rate: float | None) -> str:
        """Return why a sample is left out: the first rule that it breaks; empty if it is kept.

        Args:
            sample: a chat or a document.
            pass_rate: of a model's answers to it; None if there are none.
        """
        return next(self._reasons(sample, pass_rate), "")

    def _reasons(self, sample: Sample, pass_rate: float | None) -> Iterator[str]:
        if self.needs_pass_rates and pass_rate is None:
            yield "no answers of a model"
        yield from bound_broken("pass rate", pass_rate, self.min_pass_rate, self.max_pass_rate)
        # A document has neither question nor answer.
        if sample.kind != "chat":
            return

        question = question_of(sample)
        yield from bound_broken("question", len(question), self.min_question, self.max_question)
        if message := last_answer(sample):
            yield from self._reasons_of_answer(message, question)
        elif self.min_answer is not None:
            yield "no answer"

    def _reasons_of_answer(self, message: Message, question: str) -> Iterator[str]:
        answer, thoughts = text_of(message.content), thoughts_of(message.content)
        yield from bound_broken("answer", len(answer), self.min_answer, self.max_answer)
        yield from bound_broken("thoughts", len(thoughts), None, self.max_thoughts)
        # These two read every letter: only where they are asked for.
        if self.max_mismatch is not None:
            mismatch = language_mismatch(question, answer + thoughts)
            yield from bound_broken("language mismatch", mismatch, None, self.max_mismatch)
        if self.max_repetition is not None:
            worst = max(repetition(answer), repetition(thoughts))
            yield from bound_broken("repetition", worst, None, self.max_repetition)
        if self.answers_like and not self.answers_like.search(answer):
            yield "answer lacks the pattern"
        if self.answers_unlike and self.answers_unlike.search(answer):
            yield "answer has the pattern"


def bound_broken(
    what: str, value: float | None, least: float | None, most: float | None
) -> Iterator[str]:
    """Yield which of two bounds a value breaks, without the value: reasons are counted."""
    if value is not None and least is not None and value < least:
        yield f"{what} below {least:g}"
    if value is not None and most is not None and value > most:
        yield f"{what} above {most:g}"
