"""report.html: a finished run on one page, a single file that needs no network, and predictions.jsonl."""

import json
from collections.abc import Sequence
from pathlib import Path

from visionloom.common.atomic import replacing
from visionloom.common.text import printable
from visionloom.train.generation.predictions import PICTURE, Prediction
from visionloom.train.report import sections
from visionloom.train.report.history import History
from visionloom.train.report.html import whole_page
from visionloom.train.report.rollouts import rollouts
from visionloom.train.report.style import STYLE

REPORT, PREDICTIONS = "report.html", "predictions.jsonl"


def write_report(folder: Path, shown: Sequence[Prediction]) -> Path:
    """Write report.html and predictions.jsonl into a run's folder and return the report's path.

    Sections whose files are missing are left out. Texts of samples are escaped; the same run gives the same file.
    """
    write_predictions(folder / PREDICTIONS, shown)
    page = page_of(History.read(folder), shown)
    path = folder / REPORT
    with replacing(path) as file:
        file.write(printable(page).encode())
    return path


def page_of(history: History, shown: Sequence[Prediction]) -> str:
    """Return the page as HTML."""
    parts = [
        sections.header(history),
        sections.results(history),
        sections.phases(history),
        sections.time_spent(history),
        sections.losses(history),
        sections.sources(history),
        rollouts(history),
        sections.pace(history),
        sections.gallery(shown),
        sections.notes(history),
    ]
    return whole_page(history.name, STYLE, parts)


def write_predictions(path: Path, shown: Sequence[Prediction]) -> None:
    """Write each prediction as a line of JSON, for scripts."""
    with replacing(path) as file:
        for prediction in shown:
            sample = prediction.sample
            line = {
                "id": sample.sample_id,
                "source": sample.dataset,
                "task": sample.task,
                "question": prediction.question.replace(PICTURE, "[picture]"),
                "answer": sample.answer,
                "prediction": prediction.text,
                "correct": prediction.correct,
            }
            text = json.dumps(line, ensure_ascii=False) + "\n"
            # A model may write half of a surrogate pair, which UTF-8 has no bytes for.
            file.write(text.encode("utf-8", "backslashreplace"))
