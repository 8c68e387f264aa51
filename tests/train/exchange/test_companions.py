"""The files beside exported weights: where they are found, what they say of the run, and what is told where they cannot.

References: transformers' processors as they read the files; the media rules of data/encode/geometry.py.
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoImageProcessor, AutoVideoProcessor

from visionloom.common.errors import UserError
from visionloom.data.config import MediaConfig
from visionloom.data.encode.chat import render
from visionloom.data.encode.chat_template import format_of, template_of
from visionloom.data.shards.sample_json import parse_sample
from visionloom.model.config import ModelConfig
from visionloom.tests.data.encode.test_chat import THINKING, TOOLS
from visionloom.tests.data.samples import RULES
from visionloom.tests.train.exchange.test_served import as_messages
from visionloom.train.checkpoint.state_file import STATE, Inputs, RunState
from visionloom.train.config import RunConfig
from visionloom.train.exchange.companions import (
    COMPANIONS,
    Companions,
    carry,
    carry_into_run,
    companions,
    companions_of,
)
from visionloom.train.exchange.serving import bounds, carry_companions, write_serving_files
from visionloom.train.exchange.token_table import TokenTable

OWN = MediaConfig(
    image_min_pixels=2048, image_max_pixels=77_777, video_min_pixels=3000, video_max_pixels=222_222, video_fps=1.5,
    video_min_frames=2, video_max_frames=9,
)  # fmt: skip


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def stored(
    run: Path, tokenizer: Path, weights: str = "", media: MediaConfig = OWN
) -> tuple[Path, RunState]:
    """A checkpoint's folder inside a run's, and its state."""
    folder = run / "checkpoints" / "sft" / "step-00000004"
    inputs = Inputs(str(tokenizer), TokenTable.read(tokenizer, "x").hash, asdict(media), weights)
    run_state = RunState("sft", 4, 4, 4, {}, asdict(ModelConfig()), 4, {}, asdict(inputs))
    write(folder / STATE, asdict(run_state))
    return folder, run_state


def serve(folder: Path, files: Companions) -> list[str]:
    """The files of an export; what is told of them."""
    folder.mkdir()
    return write_serving_files(folder, files, carry_companions(files, folder))


def test_processors_have_the_rules_of_the_run(demo_data: Path, tmp_path: Path) -> None:
    checkpoint, run_state = stored(tmp_path / "run", demo_data / "tokenizer")
    assert serve(tmp_path / "out", companions(checkpoint, run_state)) == []
    image, video = (
        kind.from_pretrained(tmp_path / "out") for kind in (AutoImageProcessor, AutoVideoProcessor)
    )
    assert (image.size.shortest_edge, image.size.longest_edge) == (2048, 77_777)
    assert (video.size.shortest_edge, video.size.longest_edge) == (3000, 222_222)
    assert (video.fps, video.min_frames, video.max_frames, video.cap_pixels_per_frame) == (
        1.5,
        2,
        9,
        False,
    )
    for processor in (image, video):
        assert (processor.patch_size, processor.temporal_patch_size, processor.merge_size) == (
            16,
            2,
            2,
        )
        assert list(processor.image_mean) == list(processor.image_std) == [0.5, 0.5, 0.5]


def test_bounds_that_came_with_the_weights_give_way_and_are_told(
    demo_data: Path, tmp_path: Path
) -> None:
    """Wherever a release of transformers would look for them: min_pixels, size, or nested in processor_config.json."""
    weights = tmp_path / "weights"
    write(weights / "config.json", {})
    write(
        weights / "preprocessor_config.json",
        {"min_pixels": 1, "max_pixels": 5, "size": {"shortest_edge": 6}, "mine": "kept"},
    )
    nested = {
        "size": {"shortest_edge": 4096, "longest_edge": 25_165_824},
        "fps": 7,
        "max_frames": 3,
        "also": "kept",
    }
    write(
        weights / "processor_config.json",
        {"processor_class": "Qwen3VLProcessor", "video_processor": nested},
    )
    write(
        weights / "generation_config.json",
        {"temperature": 0.7, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3},
    )
    checkpoint, run_state = stored(tmp_path / "run", demo_data / "tokenizer", str(weights))
    carry(weights, tmp_path / "run" / COMPANIONS)
    carry(demo_data / "tokenizer", tmp_path / "run" / COMPANIONS)
    told = serve(tmp_path / "out", companions(checkpoint, run_state))
    assert [line.split(",")[0] for line in told] == [
        "preprocessor_config.json has size 2048 to 77777 pixels",
        "video_preprocessor_config.json has size 3000 to 222222 pixels",
    ]
    assert "said 1 to 5" in told[0] and "said 4096 to 25165824" in told[1]
    image, video = (
        kind.from_pretrained(tmp_path / "out") for kind in (AutoImageProcessor, AutoVideoProcessor)
    )
    assert (image.size.shortest_edge, image.size.longest_edge, image.mine) == (2048, 77_777, "kept")
    assert (
        video.size.shortest_edge,
        video.size.longest_edge,
        video.fps,
        video.max_frames,
        video.also,
    ) == (
        3000,
        222_222,
        1.5,
        9,
        "kept",
    )
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {
        "temperature": 0.7,
        "bos_token_id": 486,
        "eos_token_id": [488, 486],
        "pad_token_id": 486,
    }


@pytest.mark.parametrize(
    "content",
    [
        {"size": {"longest_edge": 9, "shortest_edge": 4}, "min_pixels": None, "max_pixels": None},
        {"size": {"max_pixels": 9, "min_pixels": 4}},
        {
            "size": {"max_pixels": 1, "longest_edge": 7, "shortest_edge": 5},
            "min_pixels": 4,
            "max_pixels": 9,
        },
    ],
)
def test_bounds_are_read_in_every_form(content: dict[str, Any]) -> None:
    """Saved again with all defaults, with the names inside size, and with bounds that go before size."""
    assert bounds(content) == (4, 9)


@pytest.mark.parametrize(
    ("media", "part", "cap"),
    [
        (
            replace(OWN, rule="qwen_utils"),
            "data.media.rule=qwen_utils is not what transformers' processors do",
            None,
        ),
        (
            replace(OWN, rule="hf_capped"),
            "transformers 4.57 does not know cap_pixels_per_frame and leaves frames larger",
            768,
        ),
        (
            replace(OWN, rule="hf_capped", frame_max_pixels=20_500),
            "rounded down to whole tokens, by 20 pixels",
            20,
        ),
    ],
)
def test_rules_that_a_processor_cannot_say_are_told(
    media: MediaConfig, part: str, cap: int | None, demo_data: Path, tmp_path: Path
) -> None:
    checkpoint, run_state = stored(tmp_path / "run", demo_data / "tokenizer", media=media)
    (line,) = serve(tmp_path / "out", companions(checkpoint, run_state))
    assert part in line
    video = AutoVideoProcessor.from_pretrained(tmp_path / "out")
    assert (video.cap_pixels_per_frame, video.max_video_tokens if cap else None) == (
        cap is not None,
        cap,
    )


def test_a_run_keeps_the_tokenizer_that_it_trains_with(demo_data: Path, tmp_path: Path) -> None:
    """Not the one beside its first weights; all else is theirs. An export needs neither folder any more."""
    weights, own = tmp_path / "weights", tmp_path / "tokenizer"
    shutil.copytree(demo_data / "tokenizer", weights)
    shutil.copytree(demo_data / "tokenizer", own)
    (own / "tokenizer.json").write_text(
        json.dumps(json.loads((own / "tokenizer.json").read_text()), indent=5)
    )
    (weights / "chat_template.jinja").write_text("theirs")
    write(weights / "config.json", {"a": 1})
    config = RunConfig()
    config.init.huggingface, config.data.tokenizer = str(weights), str(own)
    carry_into_run(config.init, config.data.tokenizer, tmp_path / "run")
    checkpoint, run_state = stored(tmp_path / "run", own, str(weights))
    kept = (own / "tokenizer.json").read_bytes()
    shutil.rmtree(weights)
    shutil.rmtree(own)
    told = serve(tmp_path / "out", companions(checkpoint, run_state))
    assert told == []
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == kept
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "theirs"


@pytest.mark.parametrize("change", ["gone", "another"])
def test_a_lost_tokenizer_is_told_and_no_other_taken(
    change: str, demo_data: Path, tmp_path: Path
) -> None:
    own = tmp_path / "tokenizer"
    shutil.copytree(demo_data / "tokenizer", own)
    checkpoint, run_state = stored(tmp_path / "run", own)
    if change == "gone":
        shutil.rmtree(own)
    else:
        (own / "tokenizer.json").write_text(
            json.dumps(json.loads((own / "tokenizer.json").read_text()), indent=5)
        )
        shutil.copytree(own, tmp_path / "run" / COMPANIONS)
    (line,) = serve(tmp_path / "out", companions(checkpoint, run_state))
    assert line.startswith(f"no tokenizer goes along: data.tokenizer={own}") and "hf=DIR" in line
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    other = demo_data / "tokenizer"  # named by hand
    assert serve(tmp_path / "again", companions(checkpoint, run_state, other)) == []
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (
        other / "tokenizer.json"
    ).read_bytes()


def test_an_older_run_is_read_from_where_it_was_started(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state says nothing of its inputs, and its config.yaml has relative folders."""
    start, run = tmp_path / "home", tmp_path / "home" / "runs" / "mine"
    shutil.copytree(demo_data / "tokenizer", start / "tokenizer")
    checkpoint, run_state = stored(run, start / "tokenizer")
    known = {"plan": {"tokenizer": TokenTable.read(start / "tokenizer", "x").hash[:8]}}
    run_state = replace(run_state, inputs={}, data=known)
    settings = {
        "run": {"folder": "runs/mine"},
        "init": {},
        "data": {"tokenizer": "tokenizer", "media": asdict(OWN)},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    found = companions(checkpoint, run_state)
    assert (found.tokenizer, found.media, found.missing) == (start / "tokenizer", OWN, [])


def test_a_checkpoint_without_its_run_still_says_how_it_was_trained(
    demo_data: Path, tmp_path: Path
) -> None:
    checkpoint, run_state = stored(tmp_path / "run", demo_data / "tokenizer")
    shutil.move(checkpoint, tmp_path / "moved")
    found = companions(tmp_path / "moved", run_state)
    assert (found.tokenizer, found.media, found.missing) == (demo_data / "tokenizer", OWN, [])


def test_a_moved_checkpoint_takes_nothing_that_lies_around(demo_data: Path, tmp_path: Path) -> None:
    """A folder that happens to be named as the run's own is not its run's; an older state alone cannot say where files are."""
    checkpoint, run_state = stored(tmp_path / "run", demo_data / "tokenizer")
    place = tmp_path / "models" / "mine" / "step"
    shutil.copytree(checkpoint, place)
    shutil.copytree(demo_data / "tokenizer", tmp_path / COMPANIONS)
    write(tmp_path / COMPANIONS / "generation_config.json", {"temperature": 9})
    found = companions(place, run_state)
    assert (found.tokenizer, found.others, found.missing) == (demo_data / "tokenizer", [], [])
    known = {"plan": {"tokenizer": TokenTable.read(demo_data / "tokenizer", "x").hash[:8]}}
    older = companions(place, replace(run_state, inputs={}, data=known))
    assert older.tokenizer is None
    assert older.missing == [
        f"no tokenizer goes along: the one that {place} was trained with is gone or another one now: put it back, or name a"
        " folder that has it with hf=DIR"
    ]


def test_checkpoints_on_another_disk_are_their_runs(demo_data: Path, tmp_path: Path) -> None:
    checkpoint, run_state = stored(tmp_path / "run", demo_data / "tokenizer")
    shutil.copytree(demo_data / "tokenizer", tmp_path / "run" / COMPANIONS)
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "disk" / "of-mine")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk" / "of-mine")
    (tmp_path / "best").symlink_to(tmp_path / "run" / "checkpoints" / "sft" / "step-00000004")
    assert companions(checkpoint, run_state).others == [tmp_path / "run" / COMPANIONS]
    assert not companions_of(tmp_path / "best")


def test_a_template_around_videos_is_told(demo_data: Path, tmp_path: Path) -> None:
    """transformers 5.10 and later keep what the published template puts around a video."""
    source = tmp_path / "tokenizer"
    shutil.copytree(demo_data / "tokenizer", source)
    (source / "chat_template.jinja").write_text("<|vision_start|><|video_pad|><|vision_end|>")
    (line,) = serve(tmp_path / "out", Companions(source, [], OWN))
    assert (
        "chat_template.jinja came with the weights" in line
        and "give it <|video_pad|> alone" in line
    )


def test_the_template_is_our_rendering() -> None:
    """Reference: what transformers rendered with the published template, which both must equal."""
    from transformers.utils.chat_template_utils import render_jinja_template

    for chat_format, cases in (("instruct", TOOLS), ("thinking", THINKING)):
        template = template_of(chat_format)
        assert format_of(template) == format_of(json.dumps(template)) == chat_format
        for case in cases:
            sample = parse_sample(case["sample"])
            told, _ = render_jinja_template(
                [as_messages(sample)], tools=list(sample.tools) or None, chat_template=template
            )
            assert told == [case["text"]] == [render(sample, RULES, chat_format).text]


def test_a_template_of_the_other_format_is_replaced(demo_data: Path, tmp_path: Path) -> None:
    """Of the format that chats were trained in, whatever the weights came with."""
    source = tmp_path / "tokenizer"
    shutil.copytree(demo_data / "tokenizer", source)
    write(source / "chat_template.json", {"chat_template": template_of("instruct")})
    (line,) = serve(tmp_path / "out", Companions(source, [], OWN, "thinking"))
    assert "data.chat_format=thinking" in line and "format instruct" in line
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template_of("thinking")
    assert not (tmp_path / "out" / "chat_template.json").exists()
    serve(tmp_path / "same", Companions(source, [], OWN, "instruct"))
    assert (tmp_path / "same" / "chat_template.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.jinja",
        "tokenizer.json",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
    ],
)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_goes_along_lies_in_its_folder(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    source = tmp_path / "source"
    source.mkdir()
    if kind == "link":
        (source / name).symlink_to(tmp_path / "secret")
    else:
        {"pipe": os.mkfifo, "folder": os.mkdir}[kind](source / name)
    with pytest.raises(UserError, match=f"{name} is a {kind}"):
        carry(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hub_goes_along(tmp_path: Path) -> None:
    """Its files are links to the blobs of the same repository, as huggingface_hub makes them."""
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    for folder in (snapshot, repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "blobs" / "77").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/77")
    carry(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}" and not (
        tmp_path / "out" / "config.json"
    ).is_symlink()


def test_a_state_cannot_name_folders_to_read(demo_data: Path, tmp_path: Path) -> None:
    """A stranger's state names folders of this machine: all that they give is the tokenizer.json whose hash the state knows."""
    secret = tmp_path / "secret"
    shutil.copytree(demo_data / "tokenizer", secret)
    for name in (
        "chat_template.jinja",
        "special_tokens_map.json",
        "generation_config.json",
        "preprocessor_config.json",
    ):
        write(secret / name, {"secret": 1})
    checkpoint, run_state = stored(tmp_path / "run", secret, str(secret))
    moved = tmp_path / "moved"
    shutil.move(checkpoint, moved)
    found = companions(moved, run_state)
    assert (found.tokenizer, found.others, found.named) == (secret, [], True)
    told = serve(tmp_path / "out", found)
    assert "no chat template and generation settings" in told[0] and "hf=DIR" in told[0]
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    unknown = replace(run_state, inputs={**run_state.inputs, "tokenizer_hash": ""})
    assert companions(moved, unknown).tokenizer is None
    for hash_ in ("", "0", run_state.inputs["tokenizer_hash"][:7], "x" * 64):
        assert (
            companions(
                moved, replace(run_state, inputs={**run_state.inputs, "tokenizer_hash": hash_})
            ).tokenizer
            is None
        )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: 3", "data should be an object"), ("data: {tokenizer: [1]}", "data.tokenizer should be a valid string"),
        ("data: {media: {rule: 3}}", "data.media.rule"), ("a: &x 1\nb: *x", "aliases"), ("- 1", "should be a mapping"),
    ],
)  # fmt: skip
def test_a_run_of_another_form_is_one_line(
    text: str, told: str, demo_data: Path, tmp_path: Path
) -> None:
    checkpoint, run_state = stored(tmp_path / "run", demo_data / "tokenizer")
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=told) as raised:
        companions(checkpoint, replace(run_state, inputs={}))
    assert "\n" not in str(raised.value)
