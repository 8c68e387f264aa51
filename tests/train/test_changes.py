"""Settings that change between starts of a run: free ones pass, others are named, refused or told; each option has its class.

Row 28 of the fault matrix, as far as the configuration goes: changed settings are refused with what differs unless overridden.
Reference: the schema, walked; and Megatron-core's schedule, by the learning rates that the metrics show.
"""

import functools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from visionloom.common.errors import UserError
from visionloom.common.settings import options
from visionloom.launch.configure import compose
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.runs import metrics, run_config
from visionloom.tests.train.test_bounds import full, holder
from visionloom.train.changes import changes, settings_of
from visionloom.train.checkpoint.state_file import RunState, read_run_state
from visionloom.train.config import RunConfig


@functools.cache
def config(*words: str) -> RunConfig:
    found = compose(["+recipe=demo", "model=tiny", "optim=adamw", *words], 2)
    assert found is not None
    return found


def run_state(trained: RunConfig, phase: str = "align", done: int = 10) -> RunState:
    """A checkpoint's state as JSON brings it back, after so many steps of a phase."""
    steps = trained.phases[phase].total_steps
    lora = asdict(trained.lora) if trained.lora.rank else {}
    kept = RunState(
        phase,
        done,
        250 + done,
        steps,
        {},
        asdict(trained.model),
        done,
        lora,
        {},
        settings_of(trained, phase),
    )
    return RunState(**json.loads(json.dumps(asdict(kept))))


RUN = {
    "optim.beta1": "0.8", "optim.momentum": "0.9", "optim.moments": "bf16", "optim.beta2": "0.99", "optim.epsilon": "1e-6", "optim.weight_decay": "0.2", "optim.clip_grad": "0",
    "run.precision": "bf16", "init.huggingface": "/hf", "init.checkpoint": "/c", "init.vision": "/v", "init.language": "/l",
    "model.text.rope_scaling.factor": "2", "model.text.rope_scaling.original_positions": "7", "model.text.rope_scaling.beta_fast": "9",
    "model.text.rope_scaling.beta_slow": "2", "model.text.rope_scaling.attention_factor": "1.5",
    "data.continue_draws": "true",
    "model.text.balance_coefficient": "0.5", "phases.align.lr": "1e-5", "phases.align.lr_vision": "1e-5",
    "phases.align.lr_merger": "1e-5", "phases.align.lr_min_ratio": "0.5", "phases.align.warmup_steps": "7",
    "phases.align.schedule": "wsd", "phases.align.decay_steps": "3", "phases.align.loss": "token", "phases.align.fresh": "[]",
    "phases.align.steps": "60",
}  # fmt: skip
"""Another value of options that change the run."""


@pytest.mark.parametrize("option", RUN)
def test_a_setting_that_changes_the_run(option: str) -> None:
    """Refused with both values; with run.on_change=continue it is what there is to tell."""
    kept, word = run_state(config()), f"{option}={RUN[option]}"
    with pytest.raises(UserError) as caught:
        changes(config(word), kept, "D")
    line = str(caught.value)
    was = kept.settings[option]
    assert (
        line.startswith(f"D was trained with other settings: {option} was {was}, now ")
        and "\n" not in line
    )
    assert "run.on_change=continue" in line and "set run.name to start a new run" in line
    (told,) = changes(config(word, "run.on_change=continue"), kept, "D")
    assert (told.option, told.was) == (option, was) and str(told.now).lower() == str(
        config_value(config(word), option)
    ).lower()


def config_value(found: RunConfig, option: str) -> Any:
    section, name = holder(found, option)
    return section[name] if isinstance(section, dict) else getattr(section, name)


def test_all_are_named_at_once() -> None:
    words = ["optim.beta2=0.9", "phases.align.lr=1e-5", "optim.weight_decay=0.1"]
    with pytest.raises(
        UserError,
        match=r"optim\.beta2 was 0\.95, now 0\.9.*weight_decay was 0\.05.*align\.lr was 0\.002, now 1e-05",
    ):
        changes(config(*words), run_state(config()), "D")


NEVER = {
    "model.text.layers": (["model.text.layers=5"], "model.text.layers was 4, now 5"),
    "model.text.rope_theta": (["model.text.rope_theta=2"], "model.text.rope_theta was"),
    "a wider group": (["phases.align.trainable=[merger,language]"], "align.trainable was ['merger'], now ['merger', 'language']"),
    "another group": (["phases.align.trainable=[vision]"], "align.trainable was ['merger'], now ['vision']"),
    "optim.name": (["optim=muon"], "optim.name was adamw, now muon"),
    "adapters": (["lora.rank=8", "init.huggingface=/x", "lora.groups=[merger]", "phases.align.fresh=[]",
        *(f"~phases.{name}" for name in ("language", "towers", "multimodal", "long", "ultra", "sft", "reasoning", "rl"))], "lora.rank was 0, now 8"),
    "no phase": (["~phases.align"], "D is of phase align, which this recipe lacks"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEVER)
def test_a_setting_that_cannot_change(name: str) -> None:
    words, expected = NEVER[name]
    for more in ([], ["run.on_change=continue"]):
        with pytest.raises(UserError) as caught:
            changes(config(*words, *more), run_state(config()), "D")
        assert expected in str(caught.value) and "set run.name to start a new run" in str(
            caught.value
        )
    with pytest.raises(
        UserError, match=r"set run\.name to start a new run \(and run\.folder, which is set to /r\)"
    ):
        changes(config(*words, "run.folder=/r"), run_state(config()), "D")


FREE = ["run.device=auto", "run.threads=2", "run.deterministic=true", "run.evaluate_at_end=false", "data.workers=3",
    "data.cache=/c", "data.max_bad_fraction=0.5", "checkpoint.every_steps=7", "checkpoint.keep=9", "logging.every_steps=3",
    "logging.wandb=true", "evaluation.samples=3", "parallel.recompute=full", "phases.align.parallel.tensor=2",
    "phases.align.micro_batch=1", "data.store.retries=1", "model.name=other", "run.name=other",
    "phases.multimodal.lr=1e-6", "phases.towers.lr=1", "phases.sft.steps=7", "lora.alpha=3", "~phases.reasoning", "~phases.rl",
    "phases.align.tokens=null"]  # fmt: skip


@pytest.mark.parametrize("word", FREE)
def test_free_settings_pass(word: str) -> None:
    """Logging, layouts, cadence; other phases, done or to come; adapters' where there are none."""
    assert changes(config(word), run_state(config()), "D") == []


def test_a_folder_may_be_written_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that a run began with, by a path from another working folder."""
    kept = replace(run_state(config("init.huggingface=hf/x")), inputs={"weights": "/models/hf/x"})
    monkeypatch.chdir("/")
    for same in ("models/hf/x", "/models/hf/x/", "hf/x"):
        assert changes(config(f"init.huggingface={same}"), kept, "D") == []
    with pytest.raises(UserError, match=r"init\.huggingface was hf/x, now /models/hf/y"):
        changes(config("init.huggingface=/models/hf/y"), kept, "D")


ORDERS = {
    "as before": (["align", "multimodal", "sft"], ""),
    "more to come": (["align", "multimodal", "sft", "long"], ""),
    "one that is done left out": (["multimodal", "sft"], ""),
    "one that is to come left out": (["align", "multimodal"], ""),
    "a new one before": (
        ["align", "long", "multimodal", "sft"],
        "phases was ['align'], now ['align', 'long']",
    ),
    "one to come first": (
        ["align", "sft", "multimodal"],
        "phases was ['align'], now ['align', 'sft']",
    ),
    "one that is done again": (["multimodal", "align", "sft"], "phases was ['align'], now []"),
}


@pytest.mark.parametrize("case", ORDERS)
def test_phases_before_the_one_in_progress_count_as_done(case: str) -> None:
    """One that was never trained would be passed over in silence, one that was would be trained again."""
    order, expected = ORDERS[case]
    whole = config()
    trained, now = (
        replace(whole, phases={name: whole.phases[name] for name in names})
        for names in (["align", "multimodal", "sft"], order)
    )
    kept = run_state(trained, "multimodal")
    if not expected:
        assert changes(now, kept, "D") == []
        return
    with pytest.raises(UserError) as caught:
        changes(now, kept, "D")
    assert expected in str(caught.value)
    now.run = replace(now.run, on_change="continue")
    assert [told.option for told in changes(now, kept, "D")] == ["phases"]


@pytest.mark.parametrize("value", [5, None, "vision", {"a": 1}])
def test_settings_of_another_type_are_another_value(value: Any) -> None:
    """A state is a file like any other."""
    kept = run_state(config())
    kept.settings.update(dict.fromkeys(kept.settings, value))
    with pytest.raises(UserError, match="does not fit"):
        changes(config(), kept, "D")
    older = replace(kept, settings={}, model={"text": value})
    with pytest.raises(UserError):
        changes(config(), older, "D")


def test_steps_are_compared_however_they_are_given() -> None:
    """40 steps of 4 packs of 512 tokens."""
    assert (
        changes(
            config("phases.align.steps=null", f"phases.align.tokens={40 * 4 * 512}"),
            run_state(config()),
            "D",
        )
        == []
    )
    with pytest.raises(UserError, match=r"phases\.align\.steps was 40, now 41"):
        changes(
            config("phases.align.steps=null", f"phases.align.tokens={40 * 4 * 512 + 1}"),
            run_state(config()),
            "D",
        )


def test_a_finished_phase_is_done_with() -> None:
    done = run_state(config(), done=40)
    assert (
        changes(
            config("phases.align.lr=1e-5", "phases.align.loss=token", "phases.align.steps=30"),
            done,
            "D",
        )
        == []
    )
    with pytest.raises(UserError, match=r"optim\.beta1"):
        changes(config("optim.beta1=0.5"), done, "D")
    with pytest.raises(UserError, match=r"phases\.align\.steps was 40, now 80"):
        changes(config("phases.align.steps=80"), done, "D")
    last = run_state(config(), "rl", config().phases["rl"].total_steps)
    assert changes(config("optim.beta1=0.5"), last, "D") == []


def test_checkpoints_of_older_versions_say_what_they_know() -> None:
    """They kept the model, adapters and steps only: those are compared, nothing is said of the rest."""
    kept = asdict(run_state(config()))
    del kept["settings"]
    older = RunState(**kept)
    assert changes(config("optim.beta1=0.5", "phases.align.lr=1"), older, "D") == []
    for word, expected in {
        "model.text.layers=5": "layers was 4, now 5",
        "phases.align.steps=60": "steps was 40, now 60",
    }.items():
        with pytest.raises(UserError, match=expected):
            changes(config(word), older, "D")


def test_the_class_of_each_option() -> None:
    """What a checkpoint remembers is all that is `run` or `never`; the listed ones above are of the class they should be."""
    classes = {each.name: each.rules.change for each in options(full())}
    remembered = set(settings_of(full(), "p"))
    assert remembered - {"phases"} == {
        name for name, change in classes.items() if change in ("run", "never")
    } - {"phases.p.tokens"}
    named = {name.replace("align", "p") for name in RUN}
    assert {name for name in named if classes[name] != "run"} == set()
    untested = {name for name, change in classes.items() if change == "run"} - named
    assert untested == {"phases.p.tokens", "phases.p.trainable", "lora.alpha", "lora.dropout", "lora.adapter",
        "model.text.initializer_range", "model.text.max_positions", "model.vision.initializer_range"}  # fmt: skip
    assert {
        classes[name]
        for name in ("phases.p.mixture", "phases.p.sequence_length", "run.seed", "data.media.rule")
    } == {"data"}


def train(found: RunConfig) -> str:
    """Runs on every rank of the pool: what the user is told, empty if the run came to its end."""
    from visionloom.train.run import pretrain

    try:
        pretrain(found)
    except UserError as error:
        return str(error)
    return ""


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "time"}
        for line in lines
        if line["event"] == kind
    ]


def test_a_run_goes_on_with_other_settings(pool: RankPool, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Interrupted after 2 of 6 steps; lr and weight decay change, and fewer groups train; then the schedule is the new one."""

    def start(*words: str) -> str:
        found = run_config(
            demo_data, tmp_path, 6, 1, "checkpoint.every_steps=2", "checkpoint.keep=9", *words
        )
        return pool.run(1, train, found)[0]

    assert start("phases.multimodal.schedule=constant") == ""
    for step in (4, 6):
        shutil.rmtree(tmp_path / "checkpoints" / "multimodal" / f"step-{step:08d}")
    before = (tmp_path / "config.yaml").read_text(), metrics(tmp_path)
    other = ["phases.multimodal.schedule=constant", "phases.multimodal.lr=1e-5", "optim.weight_decay=0.5",
        "phases.multimodal.trainable=[language]"]  # fmt: skip
    told = start(*other)
    for part in (
        "multimodal.lr was 0.002, now 1e-05",
        "optim.weight_decay was 0.05, now 0.5",
        "now ['language']",
    ):
        assert part in told
    assert ((tmp_path / "config.yaml").read_text(), metrics(tmp_path)) == before and events(
        tmp_path, "settings_changed"
    ) == []

    assert start(*other, "run.on_change=continue") == ""
    found = {
        line["option"]: (line["was"], line["now"]) for line in events(tmp_path, "settings_changed")
    }
    assert found["phases.multimodal.lr"] == (0.002, 1e-5) and found["optim.weight_decay"] == (
        0.05,
        0.5,
    )
    assert (
        found["phases.multimodal.trainable"] == (["vision", "merger", "language"], ["language"])
        and len(found) == 3
    )
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in metrics(tmp_path)[3:]] == [{"language": 1e-5}] * 3
    assert (
        read_run_state(tmp_path / "checkpoints" / "multimodal" / "step-00000006").settings[
            "phases.multimodal.lr"
        ]
        == 1e-5
    )
    assert start(*other) == ""
