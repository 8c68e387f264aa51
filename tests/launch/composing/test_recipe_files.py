"""Recipes from strangers: they run no code, set no variable, write nothing, and cost little, whatever flag is given.

Reference: a marker that each attack would make, the environment, and the working folder. With Hydra's own command line
the recipes with callbacks and job.env_set below did what they say.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from visionloom.common.errors import UserError
from visionloom.launch.composing.recipe_files import LARGEST, NODES, REFERENCES
from visionloom.launch.configure import compose
from visionloom.train.config import RunConfig

ROOT = Path(__file__).resolve().parents[3]
BASE = "# @package _global_\ndefaults: [/recipe/demo, _self_]\n"
CALL = "{_target_: subprocess.check_call, args: [touch, marker]}"
FLAGS: list[list[str]] = [
    [],
    ["--cfg", "job"],
    ["--cfg=job", "--resolve"],
    ["--help"],
    ["--package", "run", "--cfg=job"],
]
GONE = [["--cfg", "hydra"], ["--cfg", "all"], ["--info"], ["--info", "defaults"], ["--hydra-help"], ["-m"], ["--multirun"],
    ["--shell-completion", "install=bash"], ["--experimental-rerun", "job.pickle"], ["--run"], ["-r"], ["--config-path", "x"]]  # fmt: skip

ATTACKS = {
    "a callback": (f"{BASE}hydra: {{callbacks: {{x: {CALL}}}}}\n", "line 3: hydra is refused"),
    "a launcher": (f"{BASE}hydra: {{launcher: {CALL}, mode: MULTIRUN}}\n", "hydra is refused"),
    "the environment": (f"{BASE}hydra: {{job: {{env_set: {{VISIONLOOM_MARKED: '1'}}}}}}\n", "hydra is refused"),
    "folders": (f"{BASE}hydra: {{run: {{dir: marker}}, output_subdir: x}}\n", "hydra is refused"),
    "a search path": (f"{BASE}hydra: {{searchpath: ['pkg://antigravity', 'file:///etc']}}\n", "hydra is refused"),
    "logging": (f"{BASE}hydra: {{job_logging: {{handlers: {{f: {{filename: marker}}}}}}}}\n", "hydra is refused"),
    "by package": ("# @package hydra.job.env_set\nVISIONLOOM_MARKED: '1'\n", "package hydra.job.env_set is refused"),
    "a group of Hydra's": ("# @package _global_\ndefaults: [/recipe/demo, {override /hydra/launcher: basic}]\n", "is refused"),
    "a group of its own": ("# @package _global_\ndefaults: [/recipe/demo, {/hydra/callbacks: evil}]\n", "is refused"),
    "into Hydra's node": ("# @package _global_\ndefaults: [/recipe/demo, {/model@hydra.job: tiny}]\n", "is refused"),
    "code as a dataset": (f"{BASE}data: {{datasets: {CALL}}}\n", "_target_ is refused"),
    "code in a phase": (f"{BASE}phases: {{align: {{_target_: os.system, _args_: [touch marker]}}}}\n", "_target_ is refused"),
    "code in a list": (f"{BASE}lora: {{targets: [{CALL}]}}\n", "_target_ is refused"),
    "code in a mixture": (f"{BASE}phases: {{align: {{mixture: {{_partial_: 1}}}}}}\n", "_partial_ is refused"),
    "python's tags": (f"{BASE}run: !!python/object/apply:os.system ['touch marker']\n", "!!python/object/apply:os.system is ref"),
    "a tag on a text": (f"{BASE}run: {{name: !!python/name:os.system ''}}\n", "line 3: !!python/name:os.system is refused"),
    "a binary": (f"{BASE}run: {{name: !!binary aGFsbG8=}}\n", "!!binary is refused"),
    "a secret": (f"{BASE}data: {{tokenizer: 'http://x/${{oc.env:HOME}}'}}\n", "line 3: http://x/${oc.env:HOME} is refused"),
    "a secret behind another": (f"{BASE}run: {{name: '${{oc.env:VISIONLOOM_X,${{oc.env:HOME}}}}'}}\n", "is refused"),
    "a secret, decoded": (f"{BASE}run: {{name: '${{oc.decode:\"$\\u007boc.env:HOME}}\"}}'}}\n", "is refused"),
    "a resolver": (f"{BASE}phases: {{align: {{mixture: '${{oc.create:{{a:1}}}}'}}}}\n", "is refused"),
    "a folder to write": (f"{BASE}run: {{folder: marker}}\n", "run.folder=marker in a recipe is refused"),
    "a cache to write": (f"{BASE}data: {{cache: marker}}\n", "data.cache=marker in a recipe is refused"),
    "a cache to empty": (f"{BASE}data: {{store: {{cache: /home, cache_bytes: 1}}}}\n", "data.store.cache=/home in a recipe is ref"),
    "a program to run": (f"{BASE}evaluation: {{command: touch marker}}\n", "evaluation.command in a recipe is refused"),
    "a run elsewhere": (f"{BASE}run: {{name: ../../marker}}\n", "run.name=../../marker: names have letters"),
    "a phase elsewhere": (f"{BASE}phases: {{../../../marker: {{steps: 1}}}}\n", "phases.../../../marker: names have"),
    "a dataset elsewhere": (f"{BASE}data: {{datasets: {{../marker: {{path: x}}}}}}\n", "data.datasets.../marker: names have"),
    "a phase beside checkpoints": (f"{BASE}phases: {{latest: {{steps: 1}}}}\n", "phases.latest: a file of that name lies beside"),
    "a held-out one": (f"{BASE}data: {{validation: {{'/x': {{path: x}}}}}}\n", "data.validation./x: names have"),
    "a recipe elsewhere": ("# @package _global_\ndefaults: [../../secret]\n", "leads out of its folder"),
    "an absolute one": ("# @package _global_\ndefaults: [//etc/secret]\n", "leads out of its folder"),
    "one by URL": ("# @package _global_\ndefaults: ['file:///etc/secret']\n", "a recipe includes others by name only"),
    "one by reference": ("# @package _global_\ndefaults: [{override /model: '${model}'}]\n", "by name only"),
    "by a merge": (f"# @package _global_\nrun: &x {{hydra: {{callbacks: {CALL}}}}}\n<<: *x\n", "line 3: << is refused"),
    "a list": ("- 1\n", "line 1: a recipe is a section"),
    "a text": ("hello\n", "line 1: a recipe is a section"),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a folder of recipes, and groups that would configure Hydra if it read them."""
    (tmp_path / "D" / "recipe").mkdir(parents=True)
    for group in ("callbacks", "launcher", "job_logging"):
        (tmp_path / "D" / "hydra" / group).mkdir(parents=True)
        (tmp_path / "D" / "hydra" / group / "evil.yaml").write_text(f"x: {CALL}\n")
    (tmp_path / "secret.yaml").write_text("# @package _global_\nrun: {name: secret}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(folder: Path, text: str, *flags: str) -> str:
    """What is said of a recipe with this text; an empty text is a recipe that composes."""
    (folder / "D" / "recipe" / "evil.yaml").write_text(text)
    before = sorted(folder.rglob("*")), dict(os.environ)
    try:
        compose(["+recipe=evil", "--config-dir", "D", *flags], 1)
    except UserError as error:
        found = str(error)
    else:
        found = ""
    assert (sorted(folder.rglob("*")), dict(os.environ)) == before
    return found


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_recipe_is_refused_by_name(attack: str, folder: Path) -> None:
    text, expected = ATTACKS[attack]
    line = told(folder, text)
    assert expected in line and "\n" not in line


@pytest.mark.parametrize(
    "attack",
    ["a callback", "the environment", "folders", "by package", "into Hydra's node", "a secret"],
)
def test_no_flag_lets_it_act(attack: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = ATTACKS[attack]
    for flags in FLAGS:
        assert expected in told(folder, text, *flags)
    for flags in GONE:
        assert (
            "command line: " in (line := told(folder, text, *flags))
            or "--multirun is refused" in line
        )
    assert os.environ["HOME"] not in capsys.readouterr().out


@pytest.mark.parametrize("word", ["hydra.run.dir=marker", "+hydra.job.env_set.X=1", "++hydra.callbacks={}", "hydra/launcher=basic",
    "~hydra.job", "hydra.searchpath=[pkg://antigravity]", "+hydra/callbacks=evil", "+hydra@x=evil", "+recipe@hydra.job=evil", "hydra={run: {dir: marker}}"])  # fmt: skip
def test_words_cannot_configure_hydra(word: str, folder: Path) -> None:
    line = told(folder, BASE, word)
    assert f"'{word}' is refused" in line


def test_links_lead_nowhere(folder: Path) -> None:
    """A file outside, a folder outside, a pipe (which would be waited for), a circle of folders."""
    recipes = folder / "D" / "recipe"
    (recipes / "linked.yaml").symlink_to(folder / "secret.yaml")
    (recipes / "away").symlink_to(folder)
    (recipes / "around").symlink_to(recipes)
    os.mkfifo(recipes / "pipe.yaml")
    for name, expected in {
        "linked": "is a link out",
        "away/secret": "is a link out",
        "pipe": "is a pipe",
    }.items():
        with pytest.raises(UserError, match=expected):
            compose([f"+recipe={name}", "--config-dir=D"], 1)
    with pytest.raises(UserError, match="recipe=nothing is unknown"):
        compose(["+recipe=nothing", "--config-dir=D"], 1)
    with pytest.raises(UserError, match="leads out of its folder"):
        compose(["+recipe=../../secret", "--config-dir=D"], 1)


def test_what_recipes_may_hold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aliases, merges, references, variables of ours, texts with any sign."""
    monkeypatch.setenv("VISIONLOOM_SHARDS", "/shards")
    text = BASE + (
        "run: {name: mine, seed: 7}\n"
        "phases:\n  a: &a {steps: 3, lr: 1e-5, mixture: {text: 1}}\n  b: {<<: *a, steps: 4}\n"
        "data:\n  tokenizer: ${oc.env:VISIONLOOM_SHARDS}/${run.name}\n"
        "  datasets:\n    x: {path: '${oc.env:VISIONLOOM_NONE,here}/x'}\n    y: {path: 'a $b {c} [d] 2026-11-26'}\n"
    )
    (folder / "D" / "recipe" / "good.yaml").write_text(text)
    config = compose(["-cd", "D", "+recipe=good"], 1)
    assert isinstance(config, RunConfig)
    assert (config.run.name, config.run.seed, config.data.tokenizer) == ("mine", 7, "/shards/mine")
    assert (config.phases["b"].steps, config.phases["b"].lr, config.phases["b"].mixture) == (
        4,
        1e-5,
        {"text": 1.0},
    )
    assert [config.data.datasets[name].path for name in "xy"] == [
        "here/x",
        "a $b {c} [d] 2026-11-26",
    ]


LAUGHS = "".join(
    f"  a{n}: &a{n} {{steps: 1, mixture: {{x: 1}}, parallel: *a{n - 1}, y: *a{n - 1}}}\n"
    for n in range(1, 30)
)
COSTS = {
    "aliases": (f"{BASE}phases:\n  a0: &a0 {{steps: 1}}\n{LAUGHS}", "sections inside each other"),
    "wide aliases": (BASE + "x: &x [" + "1," * 900 + "]\ny: [" + "*x," * 900 + "]\n", f"more than {NODES} values"),
    "merges": (BASE + "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 9)),
        "more than"),
    "an alias of itself": (f"{BASE}phases: &a {{x: *a}}\n", "sections inside each other"),
    "nesting": (BASE + "x: " + "[" * 60_000, "nested too deeply"),
    "closed nesting": (BASE + "x: " + "[" * 100 + "]" * 100, "sections inside each other"),
    "size": (BASE + "#" * LARGEST, f"is larger than {LARGEST} bytes"),
    "values": (BASE + "".join(f"x{n}: 1\n" for n in range(9_000)), f"more than {NODES} values"),
    "digits": (f"{BASE}phases: {{align: {{steps: {'9' * 5000}}}}}\n", "line 3: a number of 5000 characters"),
    "hexadecimal digits": (f"{BASE}phases: {{align: {{steps: 0x{'f' * 5000}}}}}\n", "a number of 5002 characters"),
    "minutes of minutes": (f"{BASE}phases: {{align: {{steps: 1{':59' * 5000}}}}}\n", "a number of"),
    "references": (f"{BASE}run: {{name: '${{data.tokenizer}}${{data.tokenizer}}'}}\n", "may refer to one other value"),
    "many references": (BASE + "phases:\n" + "".join(f"  p{n}: ${{phases.align}}\n" for n in range(99)), f"more than {REFERENCES} ref"),
}  # fmt: skip


@pytest.mark.parametrize("cost", COSTS)
def test_a_costly_recipe_is_refused(cost: str, folder: Path) -> None:
    text, expected = COSTS[cost]
    assert expected in told(folder, text)


def test_includes_end(folder: Path) -> None:
    """Two to the thirtieth includes from thirty files, and a circle."""
    for n in range(30):
        entries = (
            f"[_self_, {{/recipe@data.a: x{n + 1}}}, {{/recipe@data.b: x{n + 1}}}]"
            if n < 29
            else "[_self_]"
        )
        (folder / "D" / "recipe" / f"x{n}.yaml").write_text(f"defaults: {entries}\n")
    (folder / "D" / "recipe" / "circle.yaml").write_text("defaults: [circle]\n")
    for name in ("x0", "circle"):
        with pytest.raises(UserError, match="include each other without end"):
            compose([f"+recipe={name}", "--config-dir=D"], 1)


SIGNS = (
    b"{",
    b"}",
    b"[",
    b"*a",
    b"${",
    b"<<",
    b"hydra",
    b"'",
    b"&a ",
    b"!!int ",
    b": ",
    b"- ",
    b"\n",
    b"\t",
    b"\0",
    b"\xff",
)


@pytest.mark.parametrize(
    "count", [pytest.param(60, id="few"), pytest.param(300, id="many", marks=pytest.mark.faults)]
)
def test_a_damaged_recipe_is_one_error_of_ours(count: int, folder: Path) -> None:
    """Recipes with bytes changed, cut out and doubled: a configuration or UserError, nothing else."""
    draw, good = random.Random(count), (ROOT / "recipes" / "recipe" / "demo.yaml").read_bytes()
    for _ in range(count):
        content = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(content))
            content[at : at + draw.choice([0, 1, 30])] = draw.choice(
                [*SIGNS, bytes(content[at : at + 200])]
            )
        (folder / "D" / "recipe" / "evil.yaml").write_bytes(content)
        try:
            compose(["+recipe=evil", "--config-dir=D"], 2)
        except UserError as error:
            assert str(error)


def test_the_memory_and_the_start_of_a_refused_bomb(folder: Path) -> None:
    """In a process of its own: below 1 GiB at its largest (512 MiB here), and torch is never imported."""
    (folder / "D" / "recipe" / "evil.yaml").write_text(COSTS["wide aliases"][0])
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))\n"
        "from visionloom.launch.configure import start\n"
        "try: start(None, sys.argv[1:])\n"
        "finally: assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, "+recipe=evil", "--config-dir", "D"],
        env=os.environ | {"PYTHONPATH": str(ROOT / ".link")}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (
        result.returncode == 2
        and result.stderr.count("\n") == 1
        and result.stderr.startswith("error: ")
    ), result.stderr
    assert psutil.virtual_memory().total > 2**29


@pytest.mark.parametrize("words", [
    ["--config-dir", "D", "+recipe=mine", "~phases.align"], ["+recipe=mine", "~phases.align", "--config-dir", "D"],
    ["-cd=D", "~phases.align", "+recipe=mine"], ["~phases.align", "--config-dir=D", "+recipe=mine"],
    ["+recipe=mine", "-cd", "D", "~phases.align"],
])  # fmt: skip
def test_options_stand_anywhere(
    words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "D" / "recipe" / "mine.yaml").write_text(BASE + "run: {name: mine}\n")
    config = compose(words, 1)
    assert config is not None and config.run.name == "mine" and "align" not in config.phases
    for at in range(len(words) + 1):
        if at and words[at - 1] in ("--config-dir", "-cd"):
            continue
        assert compose([*words[:at], "--cfg", "job", *words[at:], "run.seed=5"], 1) is None
        shown = capsys.readouterr().out
        assert "  name: mine\n" in shown and "  seed: 5\n" in shown and "align:" not in shown


def test_one_section_and_help(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "D" / "recipe" / "mine.yaml").write_text(BASE + "run: {name: mine}\n")
    assert (
        compose(["+recipe=demo", "--cfg", "job", "-p", "phases.align", "phases.align.steps=17"], 1)
        is None
    )
    shown = capsys.readouterr().out
    assert shown.startswith("sequence_length: 512\n") and "steps: 17\n" in shown
    assert compose(["--help", "--config-dir=D"], 1) is None
    shown = capsys.readouterr().out
    assert (
        "--config-dir DIR" in shown
        and "recipe: demo, distillation/demo, full/" in shown
        and ", mine," in shown
        and "name: ???" in shown
    )
    with pytest.raises(UserError, match=r"--package phases\.algin"):
        compose(["+recipe=demo", "--cfg=job", "--package=phases.algin"], 1)
    with pytest.raises(UserError, match="add --cfg job"):
        compose(["+recipe=demo", "--resolve"], 1)


ROW_29 = {
    "key": (
        "+recipe=demo phases.align.stpes=3",
        "no such key: phases.align.stpes (did you mean phases.align.steps?)",
    ),
    "type": (
        "+recipe=demo phases.align.steps=many",
        "phases.align.steps: Value 'many' of type 'str' could not be converted to Integer",
    ),
    "recipe": ("+recipe=demmo", "recipe=demmo is unknown (did you mean demo?)"),
    "file key": (
        "+recipe=typo --config-dir D",
        "recipe/typo.yaml: no such key: run.sed (did you mean run.seed?)",
    ),
    "file syntax": (
        "+recipe=broken --config-dir D",
        "D/recipe/broken.yaml, line 3: not valid YAML: ",
    ),
}


@pytest.mark.parametrize("case", ROW_29)
def test_row_29_a_wrong_configuration_is_one_message(case: str, folder: Path) -> None:
    """Row 29 of the fault matrix, on two ranks that both find it: one line with a hint, code 2, neither torch nor Megatron-core.

    Measured 2026-11-26: 1.1 to 1.2 s each.
    """
    (folder / "D" / "recipe" / "typo.yaml").write_text(BASE + "run: {sed: 3}\n")
    (folder / "D" / "recipe" / "broken.yaml").write_text("# @package _global_\nrun: {name: x\n")
    words, expected = ROW_29[case]
    before = sorted(folder.rglob("*"))
    lines = []
    for rank in ("0", "1"):
        ranks = {
            "RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": "2",
            "TORCHELASTIC_RUN_ID": "none",
        }
        script = (
            "import sys; from visionloom.launch import exit; exit.SECONDS_UNTIL_ENDED = 0\n"
            "from visionloom.launch.pretrain import main; sys.argv[0] = 'pretrain.py'\n"
            "try: main()\n"
            "finally: assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
        )
        result = subprocess.run(
            [sys.executable, "-c", script, *words.split()],
            env=os.environ | ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PYTHONPATH": str(ROOT / ".link")},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (result.returncode, result.stdout) == (2, "")
        lines += result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and expected in lines[0]
    assert sorted(folder.rglob("*")) == before


def test_names_from_a_recipe_give_no_orders_to_the_terminal(folder: Path) -> None:
    """Keys, values of choices, names and tags with escape sequences and line breaks: written as escapes, on one line."""
    for text in (
        'run: {"s\\e[31m\\need": 3}\n',
        'run: {device: "c\\e[31m\\nu"}\n',
        'phases: {"a\\e[31m\\nb": {steps: 1}}\n',
        'phases: {align: {mixture: {"a\\e[31m\\nb": 1}}}\n',
        '"x\\e[31m": 1\n',
        'run: {name: "a\\e[31m\\nb"}\n',
        'phases: {align: {steps: "a\\e[31m\\nb"}}\n',
        'defaults: ["/recipe/a\\e[31m\\nb"]\n',
        '"hydra.\\e[31m\\nb": 1\n',
    ):
        line = told(folder, (BASE if "defaults" not in text else "# @package _global_\n") + text)
        assert line and not {"\x1b", "\n"} & set(line) and "\\x1b[31m" in line


WRONG_TYPES = ["data: {datasets: '${run}'}", "data: {validation: {a: '${data.datasets}'}}", "phases: '${run.name}'", "phases: null",
    "model: {vision: {deepstack_layers: '${run.name}'}}", "run: {name: '${run.name}'}", "run: {folder: '${nothing}'}", "run: null",
    "data: {cache: '${data.cache}'}", "phases: {align: null}", "phases: {align: {mixture: null}}", "phases: {align: '${phases}'}",
    "phases: {align: {parallel: []}}", "data: {datasets: {a: 1}}", "phases: {align: {lr: {a: 1}}}", "lora: {targets: {a: 1}}",
    "optim: {beta1: '${optim}'}", "phases: {align: {trainable: [[merger]]}}", "phases: {align: {mixture: {text: {a: 1}}}}", "lora: {targets: [null]}", "model: {vision: {deepstack_layers: [[1]]}}"]  # fmt: skip


@pytest.mark.parametrize("text", WRONG_TYPES)
def test_values_and_references_of_another_type(text: str, folder: Path) -> None:
    """OmegaConf does not look at the type of what a reference to a section stands for."""
    for words in ([], ["+data.datasets.more.path=/d", "phases.align.parallel.tensor=1"]):
        assert "\n" not in (line := told(folder, f"{BASE}{text}\n", *words)) and line


def test_no_file_stands_in_for_the_schema(folder: Path) -> None:
    """Hydra looks for its name in all folders before it takes the dataclasses."""
    (folder / "D" / "schema.yaml").write_text("x: 1\n")
    (folder / "D" / "config.yaml").write_text("run: {name: other}\n")
    assert "no such key: x" in told(folder, f"{BASE}x: 1\n")
    assert "converted to Integer" in told(folder, f"{BASE}run: {{seed: many}}\n")
