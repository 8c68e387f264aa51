"""Rollouts in a report: how rewards rose, what was left out, and answers of the last one with what they earned."""

from collections.abc import Callable
from html import escape
from typing import Any, Final

from visionloom.common.errors import UserError
from visionloom.common.names import name_fault
from visionloom.train.generation.predictions import PICTURE
from visionloom.train.observe.metrics import number
from visionloom.train.reinforcement.groups import Group
from visionloom.train.reinforcement.store import ROLLOUTS, read_shard
from visionloom.train.report.charts import Chart, draw, measured
from visionloom.train.report.gallery import shorten
from visionloom.train.report.history import History, Line, PhaseHistory
from visionloom.train.report.html import figure, mapping, section, table

POINTS: Final = 250
GROUPS_SHOWN: Final = 6
"""Of the last rollout of each phase."""
ANSWERS_SHOWN: Final = 4
"""Of a group: the best and the worst ones."""
CHARACTERS: Final = 400
COLUMNS: Final = ("question", "reference", "answer", "rewards", "total")


def rollouts(history: History) -> str:
    """Return charts and samples of the phases that learn from rewards; empty without one."""
    phases = [each for each in history.phases if any(map(rollout_of, each.lines))]
    if not phases:
        return ""
    charts: tuple[tuple[str, Callable[[Line], Any]], ...] = (
        ("Reward, of all answers", lambda line: rollout_of(line).get("reward")),
        ("Share of right answers", lambda line: rollout_of(line).get("pass_rate")),
        ("Share of groups that teach nothing", left_out_share),
        ("Tokens of an answer", lambda line: rollout_of(line).get("answer_tokens")),
        ("Entropy, nats a token", lambda line: line.get("entropy")),
        ("Share of the gradient that gate or clip leaves", lambda line: line.get("gradient_share")),
        ("Seconds to write a rollout", lambda line: rollout_of(line).get("write_seconds")),
        (
            "Largest difference of log-probabilities at the gate",
            lambda line: rollout_of(line).get("log_probability_apart_most"),
        ),
    )
    figures = []
    for name, value in charts:
        chart = Chart(name, measured(phases, value, POINTS), phases)
        if any(len(drawn.y) for drawn in chart.curves):
            figures.append(figure(draw(chart), name))
    samples = "".join(last_groups(history, phase) for phase in phases)
    return section("Rewards", f'<div class="two">{"".join(figures)}</div>{samples}')


def rollout_of(line: Line) -> Line:
    """Return what a line of metrics tells of a rollout; empty if nothing, or nothing sensible."""
    return mapping(line.get("rollout"))


def left_out_share(line: Line) -> float | None:
    """Return the share of a rollout's prompts whose groups are not trained on."""
    facts = rollout_of(line)
    prompts, groups = number(facts.get("prompts")), number(facts.get("groups"))
    return None if not prompts or groups is None else 1 - groups / prompts


def last_groups(history: History, phase: PhaseHistory) -> str:
    """Return a table of some groups of a phase's last rollout; empty if they cannot be read."""
    if name_fault(phase.name):
        return ""
    folder = history.folder / ROLLOUTS / phase.name
    # Those that were put aside have another ending.
    shards = sorted(folder.glob("[0-9]" * 8 + "/*.tar"))
    last = [shard for shard in shards if shard.parent == shards[-1].parent]
    try:
        groups = [group for shard in last for group in read_shard(shard) if group.answers]
    except UserError:
        return ""
    rows = [row for group in groups[:GROUPS_SHOWN] for row in rows_of(group)]
    caption = f"Answers of the last rollout of {escape(phase.name)}, the best and the worst of each prompt"
    return table(COLUMNS, rows, caption) if rows else ""


def rows_of(group: Group) -> list[list[str]]:
    """Return the best and the worst answers of a group, a row each; question and reference stand in the first."""
    ranked = sorted(group.answers, key=lambda answer: -answer.total)
    half = ANSWERS_SHOWN // 2
    chosen = ranked if len(ranked) <= ANSWERS_SHOWN else ranked[:half] + ranked[-half:]
    question = group.question.replace(PICTURE, "[picture]")
    head = [_shown(question), _shown(group.reference)]
    rows = []
    for answer in chosen:
        rewards = [f"{name} {value:g}" for name, value in answer.rewards.items()]
        total = f"{answer.total:g}"
        rows.append([*head, _shown(answer.text), escape(", ".join(rewards)), total])
        # Once for all answers of the group.
        head = ["", ""]
    return rows


def _shown(text: str) -> str:
    return escape(shorten(text, CHARACTERS))
