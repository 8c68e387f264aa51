"""One record cannot stop a conversion, and what training refuses or cannot learn from is left out with its reason."""

import fractions
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from visionloom.common.errors import UserError
from visionloom.data.config import MediaConfig
from visionloom.data.convert.run import SOURCES
from visionloom.data.convert.trainable import Trainable
from visionloom.data.encode.encode import encode
from visionloom.data.encode.geometry import frame_size
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.shards.sample import Image, Text, Video
from visionloom.launch.data import main
from visionloom.tests.data.conversion import Run
from visionloom.tests.data.convert.test_run import write_parquet
from visionloom.tests.data.samples import png

ASK = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


# ---- what JSON and Unicode cannot hold

CUT = '{"messages": [{"role": "user", "content": "cut \\ud83d off"}, {"role": "assistant", "content": "a"}]}'
CUT_KEY = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}], "\\udc00": 1}'
NOT_A_NUMBER = (
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "",'
    ' "tool_calls": [{"name": "f", "arguments": {"x": %s}}]}]}'
)


@pytest.mark.parametrize(
    "line",
    [CUT, NOT_A_NUMBER % "NaN", NOT_A_NUMBER % "-Infinity", NOT_A_NUMBER % "1e999", "[" * 100_000],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_written_is_left_out_and_named(
    line: str, workers: int, tmp_path: Path
) -> None:
    good = json.dumps({"messages": ASK})
    (tmp_path / "a.jsonl").write_text("\n".join([good, line, good]))
    words = [
        "convert",
        "sharegpt",
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "set"),
        "--workers",
        str(workers),
    ]
    for _ in range(2):  # the same again finds the dataset complete
        assert main([*words, "--max-left-out", "50%"]) == 0
    (left,) = [
        json.loads(row) for row in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()
    ]
    assert left["record"] == "a.jsonl:1" and left["reason"] in (
        "breaks the schema",
        "not valid JSON",
    )
    assert main(["verify", str(tmp_path / "set"), "--workers", "1"]) == 0


def test_a_name_that_is_no_unicode_leaves_its_record_out(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (b"good", b"caf\xe9"):
        path = os.fsencode(run.source) + b"/" + name
        for ending, data in ((b".png", png(8, 8)), (b".txt", b"a picture")):
            with open(path + ending, "wb") as file:
                file.write(data)
    words = [
        "convert",
        "folder",
        str(run.source),
        str(run.folder),
        "--workers",
        "1",
        "--max-left-out",
        "50%",
    ]
    assert main(words) == 0
    assert r"1 breaks the schema (first: caf\udce9.png)" in capsys.readouterr().out
    assert run.skipped == [("caf\udce9.png", "breaks the schema")]


def test_a_key_that_is_no_unicode_is_counted(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.put("a.jsonl", CUT_KEY)
    assert main(["convert", "sharegpt", str(path), str(run.folder), "--workers", "1"]) == 0
    assert r"1 record key \udc00 (first: a.jsonl:0)" in capsys.readouterr().out


def test_a_broken_text_in_a_table_costs_its_row(run: Run) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"one", b"caf\xe9", b"three"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), run.source / "a.parquet")
    assert [sample.content for sample in run("hf", run.source)] == [
        (Text("one"),),
        (Text("three"),),
    ]
    assert run.skipped == [("a.parquet:1", "no valid Unicode")]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("odd"),
        RecursionError("deep"),
        ZeroDivisionError("zero"),
        UnicodeDecodeError("utf-8", b"", 0, 1, "odd"),
    ],
)
def test_whatever_a_record_raises_costs_that_record(
    error: Exception, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = SOURCES["sharegpt"].convert

    def convert_or_raise(self: Any, value: Any, draft: Any, options: Any) -> None:
        if value.get("id") == "bad":
            raise error
        convert(self, value, draft, options)

    monkeypatch.setattr(SOURCES["sharegpt"], "convert", convert_or_raise)
    assert (
        len(
            run(
                "sharegpt",
                run.lines({"messages": ASK}, {"id": "bad", "messages": ASK}, {"messages": ASK}),
            )
        )
        == 2
    )
    assert run.skipped == [("records.jsonl:1", "malformed record")]


def test_an_interrupted_conversion_keeps_what_it_counted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: one undisturbed conversion."""
    records = [
        {"messages": ASK, "score": n} if n % 3 else {"messages": [], "rejected": None}
        for n in range(12)
    ]
    path = run.lines(*records)
    whole = run("sharegpt", path, samples=4)
    wanted = run.tally
    run.folder = run.folder.with_name("again")
    convert, seen = SOURCES["sharegpt"].convert, []

    def convert_or_stop(self: Any, value: Any, draft: Any, options: Any) -> None:
        seen.append(value)
        if len(seen) == 7:
            raise KeyboardInterrupt
        convert(self, value, draft, options)

    monkeypatch.setattr(SOURCES["sharegpt"], "convert", convert_or_stop)
    with pytest.raises(KeyboardInterrupt):
        run("sharegpt", path, samples=4)
    assert run("sharegpt", path, samples=4) == whole and run.tally == wanted
    assert (
        run.tally.counts["left out: no conversation"] == 4
        and run.tally.first["not read: record key score"] == "records.jsonl:1"
    )
    assert run("sharegpt", path, samples=4) == whole and run.tally == wanted


# ---- what cannot be learned from


@pytest.mark.parametrize(
    ("element", "reason"),
    [
        ({"type": "image", "file": "line.png"}, "picture too narrow"),
        ({"type": "video", "files": ["a.png"], "t": [0]}, "cannot be rendered"),
        (
            {"type": "video", "files": ["a.png", "a.png"], "t": [0, 1], "start": 5, "end": 9},
            "cannot be rendered",
        ),
    ],
)
def test_what_training_would_refuse_is_left_out(
    element: dict[str, Any], reason: str, run: Run
) -> None:
    run.put("line.png", png(1, 300))
    run.put("a.png", png(8, 8))
    said = {"id": "x", "kind": "doc", "content": [element, {"type": "text", "text": "said"}]}
    assert len(run("jsonl", run.lines({"text": "good"}, said))) == 1
    assert run.skipped == [("records.jsonl:1", reason)]


def test_what_no_policy_can_fit_is_left_out(run: Run, tokenizer_folder: Path) -> None:
    """Reference: encoding what is kept. A long question can be cut by no policy; a long answer, a document and a picture can."""
    run.put("a.png", png(640, 640))
    long = "word " * 400
    records = [
        {"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": "yes"}]},
        {"messages": [{"role": "user", "content": "tell"}, {"role": "assistant", "content": long}]},
        {
            "messages": [
                {"role": "user", "content": "<image>what?"},
                {"role": "assistant", "content": "red"},
            ],
            "images": ["a.png"],
        },
        {"messages": ASK},
    ]
    trainable = Trainable(MediaConfig(), str(tokenizer_folder), 256)
    found = run("sharegpt", run.lines(*records), trainable=trainable)
    assert run.skipped == [("records.jsonl:0", "too long under every policy")]
    lengths = [
        len(encode(sample, Tokenizer(str(tokenizer_folder)), MediaConfig()).input_ids)
        for sample in found
    ]
    assert lengths[0] > 256 and lengths[1] > 256 > lengths[2]


def test_a_set_of_which_nothing_is_left_says_so(run: Run) -> None:
    lines = run.lines({"messages": [ASK[0], {**ASK[1], "loss": False}]})
    with pytest.raises(
        UserError, match=r"no sample could be converted: skipped\.jsonl there says why"
    ):
        run("sharegpt", lines)
    assert run.skipped == [("records.jsonl:0", "nothing supervised")]


def test_several_pictures_of_a_webdataset_sample_are_all_shown_and_counted(run: Run) -> None:
    with tarfile.open(run.source / "a.tar", "w") as tar:
        for name, data in (
            ("a.right.png", png(8, 8, 2)),
            ("a.LEFT.PNG", png(8, 8, 1)),
            ("a.TXT", b"both"),
            ("a.cls", b"7"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (sample,) = run("webdataset", run.source)
    assert sample.content == (Image("img0.png", 8, 8), Image("img1.png", 8, 8), Text("both"))
    assert [run.dataset.member(0, f"img{n}.png") for n in (0, 1)] == [png(8, 8, 1), png(8, 8, 2)]
    assert run.counts["samples with several pictures or videos, all before the caption"] == 1
    assert run.counts["not read: member key cls"] == 1


# ---- tables


def test_a_question_and_its_answer_are_read_as_a_chat_is(run: Run) -> None:
    rows = [
        {
            "image": png(8, 8),
            "question": "<image>\nwhat?",
            "answer": "<think>\nhm\n</think>\n\nred",
            "system": "Be brief.",
            "rejected": None,
        },
        {
            "image": None,
            "question": "what is <image>?",
            "answer": "a tag",
            "system": None,
            "rejected": None,
        },
        {"image": None, "question": "a", "answer": "b", "system": None, "rejected": "c"},
    ]
    first, second = run("hf", write_parquet(run.source / "a.parquet", rows))
    assert [message.role for message in first.messages] == ["system", "user", "assistant"]
    assert first.messages[1].content == (Image("img0.png", 8, 8), Text("what?"))
    assert len(first.messages[2].content) == 2 and second.messages[0].content == (
        Text("what is <image>?"),
    )
    assert run.skipped == [("a.parquet:2", "preference data")]


def test_a_column_of_another_meaning_is_counted(run: Run) -> None:
    rows = [{"text": "chosen not", "said": "a caption", "jpg": png(8, 8), "label": 3}]
    (sample,) = run("hf", write_parquet(run.source / "a.parquet", rows), columns={"text": "said"})
    assert sample.content == (Image("img0.png", 8, 8), Text("a caption"))
    assert {name for name in run.counts if name.startswith("not read")} == {
        "not read: record key text (not chosen)",
        "not read: record key label",
    }


# ---- videos


@pytest.fixture
def film(run: Run) -> str:
    """Six seconds of 10 frames each."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 10)
        for number in range(60):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        np.full((64, 64, 3), number * 4, np.uint8), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    run.put("a.mp4", file.getvalue())
    return "a.mp4"


@pytest.mark.parametrize(
    ("limits", "wanted", "unread"),
    [
        ({"fps": 1.0}, {"sample_fps": 1.0}, []),
        ({"nframes": 4}, {"max_frames": 4}, []),
        ({"max_frames": 8, "total_pixels": 4096}, {"max_frames": 8, "total_pixels": 8192}, []),
        ({"video_start": 1, "video_end": 2.5}, {"start": 1.0, "end": 2.5}, []),
        ({"max_pixels": 4096, "resized_height": 32}, {}, ["max_pixels", "resized_height"]),
    ],
)
def test_limits_of_a_video_in_the_words_of_qwen_vl_utils(
    limits: dict[str, Any], wanted: dict[str, Any], unread: list[str], film: str, run: Run
) -> None:
    part = {"type": "video", "video": film, **limits}
    (sample,) = run(
        "sharegpt",
        run.lines(
            {
                "messages": [
                    {"role": "user", "content": [part, {"type": "text", "text": "?"}]},
                    ASK[1],
                ]
            }
        ),
    )
    (video,) = [element for element in sample.elements if isinstance(element, Video)]
    narrowing = ("start", "end", "sample_fps", "max_frames", "total_pixels")
    assert {
        name: value for name in narrowing if (value := getattr(video, name)) is not None
    } == wanted
    assert [name for name in run.counts if name.startswith("not read")] == [
        f"not read: video key {name}" for name in unread
    ]


def test_total_pixels_means_what_qwen_vl_utils_means(run: Run) -> None:
    """Reference: the size that qwen_vl_utils gives the frames of a list."""
    vision = pytest.importorskip("qwen_vl_utils.vision_process")
    names = [run.put(f"{n}.png", png(600, 800, n)).name for n in range(4)]
    part = {"type": "video", "video": names, "sample_fps": 2, "total_pixels": 2 * 300 * 32 * 32}
    (sample,) = run(
        "sharegpt", run.lines({"messages": [{"role": "user", "content": [part]}, ASK[1]]})
    )
    (video,) = [element for element in sample.elements if isinstance(element, Video)]
    frames = vision.fetch_video(
        {**part, "video": [str(run.source / name) for name in names]}, image_patch_size=16
    )
    assert frame_size(video, 4, MediaConfig(rule="qwen_utils")) == tuple(frames.shape[2:])
    assert frames.shape[2] * frames.shape[3] * 4 > part["total_pixels"]


@pytest.mark.parametrize(
    ("facts", "times", "rate"),
    [
        ({"sample_fps": 2}, (0, 0.5, 1), None),
        ({"fps": 4}, (0, 0.25, 0.5), None),
        ({"fps": 4, "sample_fps": 2}, (0, 0.25, 0.5), 2.0),
        ({"t": [0, 3, 4], "sample_fps": 1}, (0, 3, 4), 1.0),
    ],
)
def test_the_rate_of_a_list_of_frames(
    facts: dict[str, Any], times: tuple[float, ...], rate: float | None, run: Run
) -> None:
    names = [run.put(f"{n}.png", png(8, 8, n)).name for n in range(3)]
    part = {"type": "video", "video": names, **facts}
    (sample,) = run(
        "sharegpt", run.lines({"messages": [{"role": "user", "content": [part]}, ASK[1]]})
    )
    (video,) = [element for element in sample.elements if isinstance(element, Video)]
    assert (video.times, video.sample_fps) == (times, rate)


def test_one_video_in_two_parts_is_one_member(film: str, run: Run) -> None:
    parts = [
        {"type": "video", "video": film, "video_end": 2},
        {"type": "video", "video": film, "video_start": 2},
    ]
    record = {"messages": [{"role": "user", "content": parts}, ASK[1]], "videos": [film, film]}
    (sample,) = run("sharegpt", run.lines(record))
    first, second = [element for element in sample.elements if isinstance(element, Video)]
    assert (first.ref, first.end, second.ref, second.start) == ("vid0.mp4", 2.0, "vid0.mp4", 2.0)


def test_pillow_knows_no_more_formats_than_the_loader(run: Run) -> None:
    file = io.BytesIO()
    Pillow.new("RGB", (8, 8)).save(file, "PPM")
    run.put("a.png", file.getvalue())
    record = {"messages": [{"role": "user", "content": "<image>"}, ASK[1]], "images": ["a.png"]}
    run("sharegpt", run.lines({"messages": ASK}, record))
    assert run.skipped == [("records.jsonl:1", "no picture that is known")]
