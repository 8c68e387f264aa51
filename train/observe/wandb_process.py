"""The process that speaks with wandb, so that training never waits for it: `python -m visionloom.train.observe.wandb_process`.

It reads JSON lines from standard input: first the arguments of wandb.init, then values to log, until the end of the input. An error
is one line on standard error, and the process reads on, so that its writer never waits.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final

from visionloom.common.text import first_line, warn

INIT_SECONDS: Final = 10
"""Longest wait for wandb's server before values are kept on disk only."""
FINISH_SECONDS: Final = 10
"""Longest wait for the last upload at the end."""


def main() -> None:
    """Begin the run, log each line, finish; read on without wandb if that fails."""
    start = json.loads(sys.stdin.readline())
    run = begin(start)
    for line in sys.stdin:
        if run is not None and not _try(log, run, json.loads(line)):
            run = None
    if run is not None:
        _try(run.finish)


def log(run: Any, values: dict[str, Any]) -> None:
    """Log values, and tables of texts among them: `{"tables": {name: {"columns", "data"}}}`."""
    import wandb

    for name, table in values.pop("tables", {}).items():
        values[name] = wandb.Table(**table)
    run.log(values)


def begin(start: Mapping[str, Any]) -> Any:
    """Begin a wandb run, online if the user is logged in and the server answers, else offline; None if it cannot begin."""
    try:
        import wandb

        mode = mode_of(wandb)
        try:
            run = _init(wandb, start, mode)
        except Exception as error:
            if mode != "online":
                raise
            warn(
                f"warning: wandb does not answer, values are kept for `wandb sync` in {start['dir']}/wandb: {first_line(error)}"
            )
            # Under another id: wandb's own process still tries to begin this one.
            other = {"id": f"{start['id']}-offline-{os.getpid()}"}
            run = _init(wandb, dict(start) | other, "offline")
        # Steps come as values: wandb's own counter would refuse those that a resumed run takes again.
        run.define_metric("*", step_metric="step")
    except Exception as error:  # whatever it is, training matters more
        _give_up(error)
        return None
    return run


def mode_of(wandb: Any) -> str:
    """Return WANDB_MODE, or else `online` if the user is logged in and `offline` if not."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    # Unverified: asking the server would be a second wait.
    is_logged_in = wandb.login(prompt=False, verify=False)
    return "online" if is_logged_in else "offline"


def _init(wandb: Any, start: Mapping[str, Any], mode: str) -> Any:
    """Begin a run in a mode of wandb, without anything on the screen."""
    return wandb.init(
        **start,
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            login_timeout=INIT_SECONDS,
        ),
    )


def _try(action: Callable[..., object], *arguments: object) -> bool:
    """Call wandb; returns whether it worked, and says if not."""
    try:
        action(*arguments)
    except Exception as error:  # whatever it is, training matters more
        _give_up(error)
        return False
    return True


def _give_up(error: Exception) -> None:
    warn(
        f"warning: wandb is off from here on, training goes on: {first_line(error)} (WANDB_MODE=offline needs no network)"
    )


if __name__ == "__main__":
    main()
