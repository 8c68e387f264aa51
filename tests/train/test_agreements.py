"""What must agree is compared, and what may differ is let through: one line for each fault, both sides and the fix in it.

References: the files that transformers' own save_pretrained writes; the numbers of the published preprocessors and generation settings.
"""

import copy
import functools
import json
import operator
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer as Backend
from transformers import AutoProcessor, GenerationConfig

from visionloom.common.errors import UserError
from visionloom.data.config import MediaConfig
from visionloom.model.config import ModelConfig, TextConfig
from visionloom.model.huggingface.config import write_config
from visionloom.tests.train.runs import run_config
from visionloom.train import agreements
from visionloom.train.agreements import AGREEMENTS, check_export, check_folder, check_run
from visionloom.train.checkpoint.state_file import STATE, Inputs, RunState
from visionloom.train.config import RunConfig
from visionloom.train.exchange.companions import Companions
from visionloom.train.exchange.serving import write_serving_files
from visionloom.train.exchange.token_table import TokenTable

Edit = Callable[[Path], None]


def set_in(name: str, section: str = "", **values: Any) -> Edit:
    """Change keys of a JSON file of the folder."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (content.setdefault(section, {}) if section else content).update(values)
        (folder / name).write_text(json.dumps(content))

    return edit


def respaced(folder: Path) -> None:
    """Another file that says the same."""
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=7))


def renumbered(folder: Path) -> None:
    """Two special tokens change places."""
    text = (folder / "tokenizer.json").read_text()
    content = json.loads(text)
    first, second = (
        token
        for token in content["added_tokens"]
        if token["content"] in ("<|image_pad|>", "<|video_pad|>")
    )
    first["id"], second["id"] = second["id"], first["id"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def renamed(folder: Path) -> None:
    """A row of another token under a new name."""
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|object_ref_start|>", "<grasp>"))


def cut_otherwise(folder: Path) -> None:
    """All ids stay, but digits are no longer apart."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    content["model"]["merges"] = content["model"]["merges"][:100]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def with_token(folder: Path, number: int = 512, content: str = "<grasp>") -> None:
    """One more token."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"].append({"id": number, "content": content, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def only_its_config(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()


def without_thoughts(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["content"] != "<think>"
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.fixture
def folder(demo_data: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder of the tiny model, all but its weights."""
    made = tmp_path / "hf"
    shutil.copytree(demo_data / "tokenizer", made)
    tokens, model = TokenTable.read(made, "hf"), tiny(demo_data, tmp_path).model
    (made / "config.json").write_text(
        json.dumps(write_config(model, "bfloat16", tokens.added, None))
    )
    write_serving_files(made, Companions(media=MediaConfig()), tokens)
    return made


@functools.cache
def composed(data: Path) -> RunConfig:
    """The demo's run; composing takes a second."""
    return run_config(data, Path("nowhere"), 4, 1)


def tiny(demo_data: Path, tmp_path: Path, *words: str) -> RunConfig:
    """The demo's run with other values."""
    config = copy.deepcopy(composed(demo_data))
    for word in (f"run.folder={tmp_path}/run", *words):
        option, _, value = word.partition("=")
        section, _, name = option.rpartition(".")
        setattr(operator.attrgetter(section)(config), name, yaml.safe_load(value))
    return config


def lines(config: RunConfig, checkpoint: str = "") -> list[str]:
    """What is refused."""
    try:
        check_run(config, checkpoint)
    except UserError as error:
        return str(error).splitlines()
    return []


# The agreement; what is done to the model's folder, to the tokenizer's; words of the recipe; what the line says.
FAULTS: dict[str, tuple[str, Edit | None, Edit | None, list[str], list[str]]] = {
    "fewer rows": (
        "every_token_has_a_row", set_in("config.json", "text_config", vocab_size=256), None, ["model.text.vocab_size=256"],
        ["data.tokenizer=", "ids up to 511 (</think>)", "model.text.vocab_size=256 has rows for 0 to 255", "model.text.vocab_size=512"],
    ),
    "fewer rows than the weights have": (
        "every_token_has_a_row", set_in("config.json", "text_config", vocab_size=896), None, ["model.text.vocab_size=256"],
        ["ids up to 511 (</think>)", "model.text.vocab_size=256 has rows for 0 to 255", "set model.text.vocab_size=896"],
    ),
    "a token more than rows": (
        "every_token_has_a_row", None, with_token, [], ["ids up to 512 (<grasp>)", "rows for 0 to 511", "vocab_size=640"],
    ),
    "a new token under adapters": (
        "adapted_tokens_have_trained_rows", None, with_token, ["model.text.vocab_size=640", "lora.rank=4"],
        ["ids up to 512 (<grasp>)", "config.json has 512 rows", "lora.rank"],
    ),
    "no token for thoughts": ("special_tokens_are_there", None, without_thoughts, [], ["data.tokenizer=", "lacks", "<think>"]),
    "a token in the settings alone": (
        "a_tokenizer_says_one_thing", None, set_in("tokenizer_config.json", added_tokens_decoder={"511": {"content": "<grasp>"}}), [],
        ["tokenizer_config.json", "<grasp> is 511", "tokenizer.json lacks it", "save the tokenizer anew"],
    ),
    "other ids": (
        "the_tokenizer_is_that_of_the_weights", None, renumbered, [],
        ["data.tokenizer=", "hf/tokenizer.json", "<|video_pad|> is 498 here and 499 there, and 1 more tokens differ", "give that folder"],
    ),
    "another token in a row": (
        "the_tokenizer_is_that_of_the_weights", None, renamed, [],
        ["data.tokenizer=", "is <grasp> here and <|object_ref_start|> there", "give that folder"],
    ),
    "other cuts": (
        "the_tokenizer_is_that_of_the_weights", None, cut_otherwise, [], ["the same text is cut as [", "give that folder"],
    ),
    "another picture token": (
        "vision_tokens_are_alike", set_in("config.json", image_token_id=151655), None, [],
        ["config.json has image_token_id 151655", "has <|image_pad|> as 498"],
    ),
    "another end": (
        "answers_end_alike", set_in("generation_config.json", eos_token_id=[151645, 151643]), None, [],
        ["generation_config.json has eos_token_id [151645, 151643]", "answers end with 488 (<|im_end|>) or 486 (<|endoftext|>)"],
    ),
    "a word as padding": (
        "answers_end_alike", set_in("generation_config.json", pad_token_id=3), None, [],
        ["generation_config.json has pad_token_id 3", "pads with 486"],
    ),
    "another end in config.json": (
        "answers_end_alike", set_in("config.json", "text_config", eos_token_id=2), None, [], ["config.json has eos_token_id 2"],
    ),
    "another end beside text_config, where trainers write it": (
        "answers_end_alike", set_in("config.json", eos_token_id=[488, 3]), None, [], ["config.json has eos_token_id [488, 3]"],
    ),
    "a word as padding beside text_config": (
        "answers_end_alike", set_in("config.json", pad_token_id=3), None, [], ["config.json has pad_token_id 3", "pads with 486"],
    ),
    "ends that are no ids": (
        "answers_end_alike", set_in("generation_config.json", eos_token_id=[[488]]), None, [], ["has eos_token_id [[488]]"],
    ),
    "another end in the tokenizer": (
        "answers_end_alike", None, set_in("tokenizer_config.json", eos_token="</s>"), [], ["tokenizer_config.json has eos_token </s>"],
    ),
    "another model": (
        "the_model_is_that_of_the_folder", None, None, ["model.text.mrope_section=[4, 6, 6]"],
        ["model.text.mrope_section=[4, 6, 6]", "hf/config.json says [6, 5, 5]: set it alike"],
    ),
    "pixels of another model": (
        "pixels_are_those_of_the_data", set_in("preprocessor_config.json", image_mean=[0.48, 0.46, 0.41]), None, [],
        ["preprocessor_config.json has image_mean [0.48, 0.46, 0.41]", "prepared with [0.5, 0.5, 0.5]"],
    ),
    "patches of another model": (
        "pixels_are_those_of_the_data", set_in("video_preprocessor_config.json", patch_size=14), None, [],
        ["video_preprocessor_config.json has patch_size 14", "with 16"],
    ),
    "pixels as transformers 5 nests them": (
        "pixels_are_those_of_the_data", set_in("processor_config.json", "image_processor", do_normalize=False), None, [],
        ["processor_config.json (image_processor) has do_normalize False"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(
    fault: str, demo_data: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is its agreement's: without that one it is not told."""
    agreement, in_folder, in_tokenizer, words, parts = FAULTS[fault]
    own = tmp_path / "tokenizer"
    shutil.copytree(demo_data / "tokenizer", own)
    if in_folder is not None:
        in_folder(folder)
    if in_tokenizer is not None:
        in_tokenizer(own)
    config = tiny(
        demo_data, tmp_path, f"init.huggingface={folder}", f"data.tokenizer={own}", *words
    )
    found = lines(config)
    told = [line for line in found if all(part in line for part in parts)]
    assert len(told) == 1, found
    others = tuple(each for each in AGREEMENTS if each.__name__ != agreement)
    monkeypatch.setattr(agreements, "AGREEMENTS", others)
    assert (
        lines(config) == [line for line in found if line not in told]
        and len(others) == len(AGREEMENTS) - 1
    )


def test_every_agreement_is_broken_once() -> None:
    broken = {agreement for agreement, *_ in FAULTS.values()} | {
        "the_model_is_that_of_the_checkpoint",
        "the_tokenizer_is_that_of_training",
    }
    assert broken == {agreement.__name__ for agreement in AGREEMENTS}


LEGITIMATE: dict[str, tuple[Edit | None, Edit | None, list[str]]] = {
    "as it is": (None, None, []),
    "other bounds": (None, None, ["data.media.image_max_pixels=9999", "data.media.video_max_pixels=99999", "data.media.rule=qwen_utils"]),
    "bounds of another training": (
        set_in("preprocessor_config.json", size={"longest_edge": 99999, "shortest_edge": 1}, max_pixels=7), None, [],
    ),
    "a token with a row of its own": (None, with_token, ["model.text.vocab_size=640"]),
    "another special token as padding": (set_in("generation_config.json", pad_token_id=497), None, []),
    "ends and padding beside text_config, as trainers and unsloth write them": (
        set_in("config.json", eos_token_id=488, pad_token_id=497, bos_token_id=None), None, [],
    ),
    "settings of tokens in another form": (None, set_in("tokenizer_config.json", added_tokens_decoder=[]), []),
    "answers that end with one token": (set_in("generation_config.json", eos_token_id=486), None, []),
    "a folder of weights alone": (
        only_its_config, None, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGITIMATE)
def test_what_may_differ_is_let_through(
    case: str, demo_data: Path, folder: Path, tmp_path: Path
) -> None:
    in_folder, in_tokenizer, words = LEGITIMATE[case]
    own = tmp_path / "tokenizer"
    shutil.copytree(demo_data / "tokenizer", own)
    for edit, place in ((in_folder, folder), (in_tokenizer, own)):
        if edit is not None:
            edit(place)
    assert (
        lines(
            tiny(demo_data, tmp_path, f"init.huggingface={folder}", f"data.tokenizer={own}", *words)
        )
        == []
    )


def test_what_transformers_saves_is_let_through(
    folder: Path, demo_data: Path, tmp_path: Path
) -> None:
    """transformers 5 nests the processors' settings and writes defaults out."""
    saved = tmp_path / "saved"
    AutoProcessor.from_pretrained(folder).save_pretrained(saved)
    GenerationConfig.from_pretrained(folder).save_pretrained(saved)
    shutil.copyfile(folder / "config.json", saved / "config.json")
    assert "image_processor" in json.loads((saved / "processor_config.json").read_text())
    check_folder(saved, "hf")
    assert lines(tiny(demo_data, tmp_path, f"init.huggingface={saved}")) == []


def test_the_published_files_are_let_through(tmp_path: Path) -> None:
    """Numbers of Qwen3-VL's own files; a tokenizer with its ids alone."""
    special = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|vision_start|>": 151652,
    }
    special |= {
        "<|vision_end|>": 151653,
        "<|image_pad|>": 151655,
        "<|video_pad|>": 151656,
        "<think>": 151667,
        "</think>": 151668,
    }
    added = [{"id": number, "content": token} for token, number in special.items()]
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"added_tokens": added, "model": {"type": "BPE", "vocab": {"!": 0}}})
    )
    set_in(
        "tokenizer_config.json", eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
    )(tmp_path)
    config = write_config(
        ModelConfig(text=TextConfig()), "bfloat16", {}, {"text_config": {"bos_token_id": 151643}}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    set_in(
        "generation_config.json",
        bos_token_id=151643,
        pad_token_id=151643,
        eos_token_id=[151645, 151643],
        do_sample=True,
        top_k=20,
    )(tmp_path)
    pixels: dict[str, Any] = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    pixels |= {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    set_in(
        "preprocessor_config.json",
        size={"longest_edge": 16777216, "shortest_edge": 65536},
        **pixels,
    )(tmp_path)
    set_in(
        "video_preprocessor_config.json",
        size={"longest_edge": 25165824, "shortest_edge": 4096},
        **pixels,
    )(tmp_path)
    check_folder(tmp_path, "hf")
    set_in("config.json", video_token_id=151655)(tmp_path)
    with pytest.raises(
        UserError, match=r"has video_token_id 151655, but hf=.* has <\|video_pad\|> as 151656"
    ):
        check_folder(tmp_path, "hf")


def store(run: Path, config: RunConfig, tokenizer: Path) -> Path:
    """What tells of a checkpoint: its state, and where `latest` points."""
    folder = run / "checkpoints" / "multimodal" / "step-00000004"
    folder.mkdir(parents=True)
    inputs = Inputs.of(
        replace(config.data, tokenizer=str(tokenizer)), TokenTable.read(tokenizer, "x").hash, ""
    )
    run_state = RunState("multimodal", 4, 4, 4, {}, asdict(config.model), 4, {}, asdict(inputs))
    (folder / STATE).write_text(json.dumps(asdict(run_state)))
    (run / "checkpoints" / "latest").write_text("multimodal/step-00000004\n")
    return folder


@pytest.mark.parametrize("use", ["init.checkpoint", "resume", "evaluate", "export"])
def test_a_checkpoint_keeps_its_tokenizer(
    use: str, demo_data: Path, folder: Path, tmp_path: Path
) -> None:
    """With the same ids it is used, with others refused, and where the one of training is gone the hashes are told."""
    own = tmp_path / "tokenizer"
    shutil.copytree(demo_data / "tokenizer", own)
    config = tiny(demo_data, tmp_path, f"data.tokenizer={own}")
    stored = store(
        tmp_path / ("run" if use == "resume" else "other"), config, demo_data / "tokenizer"
    )
    words = [
        f"data.tokenizer={own}",
        *([f"init.checkpoint={stored}"] if use == "init.checkpoint" else []),
    ]

    def found() -> list[str]:
        if use != "export":
            return lines(
                tiny(demo_data, tmp_path, *words), str(stored) if use == "evaluate" else ""
            )
        try:
            check_export(stored, own, "hf")
        except UserError as error:
            return str(error).splitlines()
        return []

    respaced(own)
    assert found() == []
    renumbered(own)
    (line,) = found()
    assert f"tokenizer={own}" in line or f"hf={own}" in line
    assert f"is not what {stored} was trained with: <|video_pad|> is 498 here and 499 there" in line
    assert f"give {demo_data}/tokenizer" in line


def test_a_tokenizer_that_is_gone_is_told_by_its_hash(demo_data: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(demo_data / "tokenizer", gone)
    respaced(gone)
    stored = store(tmp_path / "other", tiny(demo_data, tmp_path), gone)
    known = TokenTable.read(gone, "x").hash[:8]
    shutil.rmtree(gone)
    (line,) = lines(tiny(demo_data, tmp_path, f"init.checkpoint={stored}"))
    assert f"had the SHA-256 {known}" in line and "put it back" in line


def test_a_run_may_be_told_to_go_on_with_another_tokenizer(demo_data: Path, tmp_path: Path) -> None:
    own = tmp_path / "tokenizer"
    shutil.copytree(demo_data / "tokenizer", own)
    renumbered(own)
    store(tmp_path / "run", tiny(demo_data, tmp_path), demo_data / "tokenizer")
    assert len(lines(tiny(demo_data, tmp_path, f"data.tokenizer={own}"))) == 1
    assert (
        lines(tiny(demo_data, tmp_path, f"data.tokenizer={own}", "data.on_change=new_phase")) == []
    )


def test_a_checkpoint_of_another_model_is_told_before_torch(
    demo_data: Path, tmp_path: Path
) -> None:
    stored = store(tmp_path / "other", tiny(demo_data, tmp_path), demo_data / "tokenizer")
    found = lines(
        tiny(
            demo_data,
            tmp_path,
            f"init.checkpoint={stored}",
            "model.text.layers=3",
            "model.text.rope_theta=5000000.0",
        )
    )
    assert [line.split(",")[0] for line in found] == [
        "model.text.layers=3",
        "model.text.rope_theta=5000000.0",
    ]
    assert all(f"but {stored} holds another model, with " in line for line in found)


@pytest.mark.parametrize("kind", ["Replace", "Prepend"])
def test_a_tokenizer_that_makes_texts_endless_is_refused(
    kind: str, demo_data: Path, tmp_path: Path
) -> None:
    """Thirty steps that double every letter; reference: the library itself, with sixteen of them."""
    shutil.copytree(demo_data / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    step = (
        {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
        if kind == "Replace"
        else {"type": kind, "prepend": "aa"}
    )
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}, *[step] * 16]}
    if kind == "Replace":
        assert len(Backend.from_str(json.dumps(content)).normalizer.normalize_str("a")) == 2**16
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"normalizer of type {kind}"):
        TokenTable.read(tmp_path / "tokenizer", "data.tokenizer")
