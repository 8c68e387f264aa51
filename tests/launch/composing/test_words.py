"""Texts reach the configuration as they were written; what Hydra's grammar cannot read is one line that shows how to write it.

Reference: the words themselves, and Hydra's own parser, which reads back every cure that a line shows.
"""

import itertools
import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from visionloom.common.errors import UserError
from visionloom.launch.composing.words import option_type, readable
from visionloom.launch.configure import compose
from visionloom.launch.convert import main as convert
from visionloom.launch.evaluate import check
from visionloom.train.config import RunConfig
from visionloom.train.phase.config import PhaseConfig

DEMO = "+recipe=demo"
PATHS = (
    "/d/step=100", "/d/a@b", "/d/100%", "/d/my data", "/d/a,b", "/d/数据", "/d/(old)", "/d/a:b", "/d/{x}", "/d/[0]", "/d/it's",
    '/d/"a"', "/d/a,b\\", "/d/a&b;c", "2024_01", "007", "1e5", "True", "a~b", "s3://b/k,v=1", "/d/+a|b*?!#", "=", "a=b=c,d",
)  # fmt: skip


def composed(*words: str) -> RunConfig:
    config = compose([DEMO, *words], 1)
    assert config is not None
    return config


def fault(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        compose([DEMO, *words], 1)
    (line,) = str(caught.value).splitlines()
    return line


def test_paths_are_taken_as_they_are() -> None:
    """In options of the schema, of datasets that words add, and in one that may be null."""
    added = {f"d{at}": path for at, path in enumerate(PATHS)}
    words = [
        f"{plus}data.datasets.{name}.path={path}"
        for (name, path), plus in zip(added.items(), itertools.cycle(["+", "++"]))
    ]
    config = composed(*words, f"data.tokenizer={PATHS[4]}", f"init.huggingface={PATHS[5]}")
    assert {name: config.data.datasets[name].path for name in added} == added
    assert (config.data.tokenizer, config.init.huggingface) == (PATHS[4], PATHS[5])
    read = [
        OverridesParser.create().parse_override(word)
        for word in readable([f"parallel.pipeline_layout={p}" for p in PATHS])
    ]
    assert [override.value() for override in read] == list(PATHS)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("'/d/a,b'", "/d/a,b"),
        ('"/d/a,b"', "/d/a,b"),
        (r"/d/a\,b", "/d/a,b"),
        (r"'a\'b'", "a'b"),
        ("${run.name}/a", "demo/a"),
    ],
)
def test_what_hydra_reads_as_one_text_stays_so(written: str, expected: str) -> None:
    assert composed(f"data.tokenizer={written}").data.tokenizer == expected


@pytest.mark.parametrize("written", ["1e-5", "'1e-5'", "1E-05", "1.0e-5", "0.00001", "10e-6"])
def test_small_numbers(written: str) -> None:
    assert composed(f"phases.align.lr={written}").phases["align"].lr == 1e-5


@pytest.mark.parametrize(
    "written", ["15e12", "1.5e13", "15E+12", "15000000000000", "15_000_000_000_000"]
)
def test_large_numbers(written: str, tmp_path: Path) -> None:
    """A budget of tokens as people write it, as a word and in a recipe; 2e-1 is none."""
    words = [
        "phases.align.steps=null",
        "phases.align.sequence_length=8192",
        "phases.align.global_batch=1024",
    ]
    assert composed(*words, f"phases.align.tokens={written}").phases["align"].tokens == 15 * 10**12
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "own.yaml").write_text(
        f"# @package _global_\ndefaults: [/recipe/demo, _self_]\nphases: {{align: {{steps: null, tokens: {written}, lr: 1e0}}}}\n"
    )
    config = compose(["--config-dir", str(tmp_path), "+recipe=own", *words], 1)
    assert config is not None
    assert (config.phases["align"].tokens, config.phases["align"].lr) == (15 * 10**12, 1.0)
    assert "phases.align.tokens" in fault("phases.align.tokens=2e-1")


def test_a_seed_may_be_a_time() -> None:
    """In milliseconds, or as digits of a date; it gives weights as any other."""
    for seed in (2**40, 20261126054136, 2**62):
        assert composed(f"run.seed={seed}").run.seed == seed


def test_a_phase_of_words_alone() -> None:
    """All of the recipe's taken out and another one put in."""
    removed = [f"~phases.{name}" for name in composed().phases]
    config = composed(*removed, "+phases.mine={steps: 2, sequence_length: 256, global_batch: 2}")
    assert list(config.phases) == ["mine"]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "~phases.algn",
            "~phases.algn: there is nothing of that name (did you mean align?), there are language, towers, align, ",
        ),
        (
            "~data.datasets.txt",
            "~data.datasets.txt: there is nothing of that name (did you mean text?), there are ",
        ),
        ("~data.validation.txt", "(did you mean text?)"),
        ("~run.nmae", "~run.nmae: there is nothing of that name (did you mean name?)"),
        ("~phases", "phases cannot be removed: name what is in it, as in ~phases.<name>"),
    ],
)
def test_what_cannot_be_removed(word: str, expected: str) -> None:
    assert expected in fault(word)


def test_a_recipe_as_editors_write_it(tmp_path: Path) -> None:
    """With a byte order mark and CRLF, as on Windows; without the line that says where its values go."""
    (tmp_path / "recipe").mkdir()
    text = "# @package _global_\r\ndefaults:\r\n  - /recipe/demo\r\n  - _self_\r\nrun: {name: mine}\r\n"
    (tmp_path / "recipe" / "own.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    config = compose(["--config-dir", str(tmp_path), "+recipe=own", "~phases.align"], 1)
    assert config is not None and config.run.name == "mine" and "align" not in config.phases
    (tmp_path / "recipe" / "own.yaml").write_text(text.partition("\n")[2])
    with pytest.raises(UserError, match="begin the file with the line `# @package _global_`"):
        compose(["--config-dir", str(tmp_path), "+recipe=own"], 1)


@pytest.mark.parametrize("name", ["a=b", "a,b", "数据", "my dir", "a%20b", "(x)"])
def test_folders_and_names_of_own_recipes(name: str, tmp_path: Path) -> None:
    recipe = tmp_path / name / "recipe" / f"{name}.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\ndefaults: [/recipe/demo, _self_]\nrun: {name: mine}\n")
    for words in (["--config-dir", str(tmp_path / name)], [f"--config-dir={tmp_path / name}"]):
        config = compose([*words, "run.seed=7", f"+recipe={name}"], 1)
        assert config is not None and (config.run.name, config.run.seed) == ("mine", 7)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("+data.datasets.m={path: /d/a,b}", "cannot read '+data.datasets.m={path: /d/a,b}'"),
        ("+data.datasets.m={path: /d/数}", "cannot read"),
        ("+data.datasets.m={path: 2024_01}", "data.datasets.m.path in '+data.datasets.m={path: 2024_01}' would be read as 202401"),
        ("lora.targets=[a,(b)]", "cannot read 'lora.targets=[a,(b)]'"),
        ("lora.targets=[1e3]", "lora.targets[0] in 'lora.targets=[1e3]' would be read as 1000.0"),
        ("lora.targets=a,b", "lora.targets takes a list, not 'a,b'"),
        ("lora.targets=[a,", "cannot read"),
        ("phases.align.mixture={a=1}", "cannot read"),
    ],
)  # fmt: skip
def test_texts_in_lists_and_sections_need_quotes(word: str, expected: str) -> None:
    line = fault(word)
    assert expected in line and "double quotes" in line
    shown = re.search(r"as in '(.+)'$", line)
    assert shown is not None
    read = OverridesParser.create().parse_override(shown[1])
    assert read.key_or_group == word.lstrip("+").partition("=")[0] and "a,b" in str(read.value())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["phases.align.steps=1,000"], "phases.align.steps takes a whole number, not '1,000'"),
        (["phases.align.lr=1e\u22125"], "phases.align.lr takes a number, not '1e\u22125'"),
        (["+data.datasets.mine.weight=1,5"], "data.datasets.mine.weight takes a number, not '1,5'"),
        (["run.deterministic=yes,no"], "run.deterministic takes true or false, not 'yes,no'"),
        (["run.sed=1,2"], "no such key: run.sed (did you mean run.seed?)"),
        (["data.tokeniser=/d/a,b"], "no such key: data.tokeniser (did you mean data.tokenizer?)"),
        (["model=tiny,tiny_moe"], "model=tiny,tiny_moe is unknown (did you mean tiny_moe?)"),
        (["run.device=cpu,cuda"], "run.device=cpu,cuda is unknown (did you mean cuda?)"),
        (["+data.datasets.数.path=/d"], "cannot read the name 'data.datasets.数.path': names have letters, digits, - and _;"),
        (["data.tokenizer=/d/my", "data"], "cannot read 'data': write key=value;", ),
        (["data.tokenizer=/d/my", "data"], "quote both for the shell: 'data.tokenizer=/d/my data'"),
        (["data.tokenizer=~/d"], 'the shell has not replaced ~ by your home folder: write "data.tokenizer=$HOME/d"'),
        (["+data.datasets.m.path=~"], 'write "+data.datasets.m.path=$HOME"'),
        (["--config-dir=~/d"], 'write "--config-dir=$HOME/d"'),
        (["run.folder=$HOME/d"], 'the shell has not replaced $HOME: write "run.folder=$HOME/d" with the double quotes'),
        (["+data.datasets.m.path=$SCRATCH"], "(a folder of that name is ./$SCRATCH)"),
    ],
)  # fmt: skip
def test_other_words_are_one_line(words: list[str], expected: str) -> None:
    assert expected in fault(*words)


def test_types_of_options() -> None:
    assert (
        option_type("data.datasets.x.path") is str
        and option_type("phases.x.parallel.virtual_pipeline") is int
    )
    assert option_type("phases.x") is PhaseConfig and option_type("phases.x.mixture.y") is float
    assert option_type("phases.x.nothing") is None and option_type("run.name.deeper") is None


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        convert(words)
    return capsys.readouterr().err


def test_own_words_of_commands_are_taken_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    config = composed()
    for path in PATHS:
        assert f"checkpoint={path} is not a folder" in told(
            ["export", f"checkpoint={path}", "out=b"], capsys
        )
        assert f"weights={path} is not a folder" in told(
            ["adapter", "checkpoint=.", f"weights={path}", "out=b"], capsys
        )
        with pytest.raises(UserError, match=re.escape(f"checkpoint={path} is not a folder")):
            check(config, path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["out=~/x"], 'write "out=$HOME/x"'),
        (["out=x", "parallel.sequence=1"], "parallel.sequence=1 must be true or false"),
        (["out=x", "parallel.tensor=[2"], "parallel.tensor=[2 must be a whole number"),
        (["out=x", "parallel.pipeline_layout=E: {"], "hf=y: no config.json"),
    ],
)
def test_a_layout_of_convert_is_typed(
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in told(["import", "hf=y", *words], capsys)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_needs_something_to_evaluate() -> None:
    config = composed()
    with pytest.raises(UserError, match="checkpoint= is not a folder"):
        check(config, "")
    check(config, None)
    config.data.validation = {}
    with pytest.raises(
        UserError, match=r"data\.validation is empty: .*\+data\.validation\.NAME\.path=DIR"
    ):
        check(config, None)
