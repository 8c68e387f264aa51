"""Every source format on small inputs made here as their publishers describe them."""

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from visionloom.common.errors import UserError
from visionloom.data.convert.json_parts import cut_json, read_json
from visionloom.data.convert.skip import Skip
from visionloom.data.shards.sample import (
    Box,
    Image,
    Message,
    Point,
    Sample,
    Text,
    Think,
    ToolCall,
    Video,
)
from visionloom.tests.data.conversion import Run
from visionloom.tests.data.samples import png


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in turns]


ASK = chat(("human", "<image>\nWhat?"), ("gpt", "This."))


# ---- LLaVA


def test_llava(run: Run) -> None:
    run.put("coco/a.png", png(20, 30, 1))
    run.put("b.png", png(40, 10, 2))
    records = [
        {"id": "one", "image": "coco/a.png", "conversations": ASK},
        {
            "id": 2,
            "conversations": chat(
                ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "See you")
            ),
        },
        {
            "image": ["coco/a.png", "b.png"],
            "conversations": chat(
                ("human", "Before <image>\nbetween\n<image> after"), ("gpt", "Yes")
            ),
        },
        {"image": "b.png", "conversations": chat(("human", "No placeholder"), ("gpt", "Yes"))},
    ]
    found = run("llava", run.put("llava.json", json.dumps(records, indent=2)))
    assert found[0] == Sample(
        "set:one",
        "chat",
        (
            Message("user", (Image("img0.png", 30, 20), Text("What?"))),
            Message("assistant", (Text("This."),)),
        ),
    )
    assert run.dataset.member(0, "img0.png") == png(20, 30, 1)
    assert [message.role for message in found[1].messages] == ["user", "assistant"] * 2
    assert found[2].messages[0].content == (
        Text("Before "),
        Image("img0.png", 30, 20),
        Text("between"),
        Image("img1.png", 10, 40),
        Text(" after"),
    )
    assert found[3].messages[0].content == (Image("img0.png", 10, 40), Text("No placeholder"))
    assert run.counts == {"records": 4, "samples": 4}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": "../secret.png", "conversations": ASK}, "refused reference with .."),
        ({"image": "a/../../secret.png", "conversations": ASK}, "refused reference with .."),
        (
            {"image": "/etc/passwd", "conversations": ASK},
            "refused path outside the source's folders",
        ),
        ({"image": "file:///etc/passwd", "conversations": ASK}, "refused reference file:"),
        ({"image": "s3://bucket/a.png", "conversations": ASK}, "refused reference s3:"),
        ({"image": "http://example.org/a.png", "conversations": ASK}, "URL not in --images-dir"),
        ({"image": "link.png", "conversations": ASK}, "refused link out of the source's folders"),
        ({"image": "nowhere.png", "conversations": ASK}, "file not found"),
        ({"image": "folder", "conversations": ASK}, "a folder, not a file"),
        ({"image": "a\0b.png", "conversations": ASK}, "not a file name"),
        ({"image": 7, "conversations": ASK}, "not a file name"),
        ({"image": "x" * 300, "conversations": ASK}, "not a file"),
        ({"image": "garbage.png", "conversations": ASK}, "no picture that is known"),
        ({"image": "cut.png", "conversations": ASK}, "broken picture"),
        ({"conversations": ASK}, "more placeholders than media"),
        (
            {"image": ["good.png", "good.png"], "conversations": ASK},
            "fewer placeholders than media",
        ),
        ({"image": "good.png", "conversations": chat(("human", "<image>"))}, "no answer"),
        ({"image": "good.png", "conversations": chat(("nobody", "x"))}, "unknown role"),
        (
            {"image": "good.png", "conversations": chat(("human", "x"), ("system", "y"))},
            "system turn in the middle",
        ),
        ({"image": "good.png"}, "no conversation"),
        ({"conversations": "text"}, "no conversation"),
        ({"conversations": [7]}, "broken turn"),
        ({"conversations": [{"from": "gpt", "value": 7}]}, "broken turn"),
        ([1, 2], "not an object"),
        ("text", "not an object"),
    ],
)
def test_a_bad_record_is_left_out_with_its_reason(
    record: object, reason: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_bytes(png(8, 8))
    run.put("good.png", png(8, 8))
    run.put("folder/a.png", png(8, 8))
    run.put("garbage.png", b"garbage" * 100)
    run.put("cut.png", png(64, 64)[:5000])
    (run.source / "link.png").symlink_to(tmp_path / "secret.png")
    good = {"image": "good.png", "conversations": ASK}
    assert len(run("llava", run.lines(good, record, good))) == 2
    assert run.skipped == [("records.jsonl:1", reason)]
    assert run.counts == {"records": 3, "samples": 2, "left out": 1, f"left out: {reason}": 1}
    assert run.tally.first == {f"left out: {reason}": "records.jsonl:1"}


def test_the_first_bad_record_may_stop_it(run: Run) -> None:
    with pytest.raises(
        UserError, match=r"records\.jsonl:1: file not found: nowhere\.png .*--on-error skip"
    ):
        run(
            "llava",
            run.lines(
                {"conversations": chat(("gpt", "a"))},
                {"image": "nowhere.png", "conversations": ASK},
            ),
            stop=True,
        )


def test_absolute_paths_and_links_inside_the_folders_are_fine(run: Run, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(png(8, 8))
    (run.source / "inside.png").symlink_to(images / "a.png")
    records = [
        {"image": str(images / "a.png"), "conversations": ASK},
        {"image": "inside.png", "conversations": ASK},
    ]
    assert len(run("llava", run.lines(*records), images_dir=images)) == 2


def test_links_may_be_followed_when_asked(run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.png").write_bytes(png(8, 8))
    (run.source / "link.png").symlink_to(tmp_path / "elsewhere.png")
    assert (
        len(run("llava", run.lines({"image": "link.png", "conversations": ASK}), follow_links=True))
        == 1
    )


# ---- ShareGPT


def test_sharegpt_with_tools(run: Run) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"name": "weather", "arguments": {"city": "Bern"}}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain in Bern?"},
        {"role": "tool_call", "content": json.dumps(call)},
        {"role": "tool_response", "content": '{"rain": false}'},
        {"role": "assistant", "content": "<think>\nDry.\n</think>\n\nNo."},
    ]
    openai = [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {**call, "arguments": json.dumps(call["arguments"])}}],
        },
        {"role": "tool", "content": "no"},
        {"role": "assistant", "content": "No."},
    ]
    found = run(
        "sharegpt",
        run.lines(
            {"messages": turns, "tools": json.dumps([tool])}, {"messages": openai, "tools": [tool]}
        ),
    )
    assert [message.role for message in found[0].messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert found[0].messages[2].content == (ToolCall("weather", {"city": "Bern"}),)
    assert found[0].messages[4].content == (Think("Dry."), Text("No."))
    assert found[1].messages[1].content == (ToolCall("weather", {"city": "Bern"}),)
    assert [sample.tools for sample in found] == [(tool,), (tool,)]


def test_sharegpt_boxes_points_and_typed_parts(run: Run) -> None:
    run.put("a.png", png(100, 200))
    objects = {"ref": ["the cat"], "bbox": [[10, 20, 60, 80], [30, 40]]}
    turns = [
        {"role": "user", "content": "<image>Find <ref-object>."},
        {"role": "assistant", "content": "<bbox> at <bbox>"},
    ]
    inline = "data:image/png;base64," + base64.b64encode(png(8, 8, 5)).decode()
    parts = [
        {"type": "text", "text": "Look: "},
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": inline}},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "ok"}]}
    found = run(
        "sharegpt",
        run.lines(
            {"messages": turns, "images": ["a.png"], "objects": objects},
            {
                "messages": turns,
                "images": ["a.png"],
                "objects": {
                    **objects,
                    "bbox": [[0.1, 0.2, 0.5, 1.0], [0, 1]],
                    "bbox_type": "norm1",
                },
            },
            {"messages": [{"role": "user", "content": parts}, answer]},
        ),
    )
    assert found[0].messages[0].content == (
        Image("img0.png", 200, 100),
        Text("Find "),
        Text("the cat"),
        Text("."),
    )
    assert found[0].messages[1].content == (
        Box(0, (10, 20, 60, 80)),
        Text(" at "),
        Point(0, (30, 40)),
    )
    assert found[1].messages[1].content[0] == Box(0, (100, 200, 500, 1000), "relative1000")
    assert found[2].messages[0].content == (
        Text("Look: "),
        Image("img0.png", 200, 100),
        Image("img1.png", 8, 8),
    )


def test_videos_as_files_and_frames(run: Run) -> None:
    pytest.importorskip("av")
    from visionloom.tests.data.convert.test_media import film

    run.put("a.mp4", film([40 * number for number in range(50)]))
    for number in range(3):
        run.put(f"frames/{number}.png", png(20, 30, number))
        run.put(f"timed/{number}.png", png(20, 30, number))
    run.put("timed/times.json", json.dumps([0.5, 1, 2.5]))
    ask = chat(("human", "<video>\nWhat?"), ("gpt", "This."))
    names = [f"frames/{number}.png" for number in range(3)]
    records: list[dict[str, Any]] = [
        {"video": "a.mp4"},
        {"videos": [{"file": "a.mp4", "start": 0.5, "end": 1.5, "max_frames": 8}]},
        {"video": "timed"},
        {"video": [names], "t": [0, 0.25, 4]},
        {"video": [{"frames": names, "fps": 2}]},
        {"video": "frames"},
        {"video": [names], "t": [0, 3, 2]},
        {"video": [{"frames": names, "t": [0, 1]}]},
    ]
    found = run("sharegpt", run.lines(*({**record, "conversations": ask} for record in records)))
    videos = [
        element for sample in found for element in sample.elements if isinstance(element, Video)
    ]
    assert (videos[0].ref, videos[0].file_frames, videos[0].fps, videos[0].times) == (
        "vid0.mp4",
        50,
        25.0,
        (),
    )
    assert (videos[1].start, videos[1].end, videos[1].max_frames) == (0.5, 1.5, 8)
    assert [video.times for video in videos[2:]] == [(0.5, 1, 2.5), (0, 0.25, 4), (0, 0.5, 1)]
    assert run.dataset.member(2, "vid0.001.png") == png(20, 30, 1)
    assert run.skipped == [
        ("records.jsonl:5", "frames without times"),
        ("records.jsonl:6", "times that go back"),
        ("records.jsonl:7", "frames without times"),
    ]


# ---- interleaved documents


def url(number: int) -> str:
    return f"https://example.org/pictures/{number}.jpg?size=large"


def fetched_as_tars(folder: Path, numbers: list[int]) -> None:
    """What img2dataset writes as webdataset: key.jpg, key.json with url, key.txt; a failed fetch has a json only."""
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in numbers[shard::2]:
                key = f"{shard:05d}{number:04d}"
                facts = {"url": url(number), "key": key, "status": "success"}
                for ending, data in (
                    ("jpg", png(16, 16, number)),
                    ("json", json.dumps(facts).encode()),
                    ("txt", b"a caption"),
                ):
                    info = tarfile.TarInfo(f"{key}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            failed = json.dumps({"url": url(99), "status": "failed_to_download"}).encode()
            info = tarfile.TarInfo(f"{shard:05d}9999.json")
            info.size = len(failed)
            tar.addfile(info, io.BytesIO(failed))


def fetched_as_files(folder: Path, numbers: list[int]) -> None:
    for number in numbers:
        path = folder / f"{number % 2:05d}" / f"{number:09d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(16, 16, number))
        path.with_suffix(".json").write_text(json.dumps({"url": url(number)}))


def named_by_hash(folder: Path, numbers: list[int]) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        (folder / (hashlib.sha256(url(number).encode()).hexdigest() + ".png")).write_bytes(
            png(16, 16, number)
        )


def named_by_url(folder: Path, numbers: list[int]) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        (folder / f"{number}.jpg").write_bytes(png(16, 16, number))


Fetched = Callable[[Path, list[int]], None]
LAYOUTS: list[Fetched] = [fetched_as_tars, fetched_as_files, named_by_hash, named_by_url]


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_obelics(layout: Fetched, run: Run, tmp_path: Path) -> None:
    layout(tmp_path / "images", [1, 2, 3])
    facts = json.dumps([{"document_url": "https://example.org/page"}, None, None])
    rows = [
        {
            "images": [url(1), None, url(2)],
            "texts": [None, "One.\n\nTwo.", None],
            "metadata": facts,
        },
        {"images": [None, url(50), None], "texts": ["Before.", None, "After."], "metadata": facts},
        {"images": [url(50)], "texts": [None], "metadata": "no json"},
        {"images": [url(3), None], "texts": [None], "metadata": None},
        {"images": [None, url(3)], "texts": ["Last.", None], "metadata": None},
    ]
    path = write_parquet(run.source / "part.parquet", rows)
    found = run("obelics", path, images_dir=tmp_path / "images", samples=2)
    assert found[0].content == (
        Image("img0.png", 16, 16),
        Text("One.\n\nTwo."),
        Image("img1.png", 16, 16),
    )
    assert run.dataset.member(0, "img1.png") == png(16, 16, 2)
    assert found[0].meta == {"url": "https://example.org/page"}
    assert found[1].content == (Text("Before.\n\nAfter."),)
    assert found[2].content == (Text("Last."), Image("img0.png", 16, 16))
    assert run.skipped == [
        ("part.parquet:2", "empty document"),
        ("part.parquet:3", "lists that differ"),
    ]
    assert run.counts["pictures left out: URL not in --images-dir"] == 1


def test_omnicorpus(run: Run, tmp_path: Path) -> None:
    fetched_as_tars(tmp_path / "images", [1, 2])
    general = {"id": "doc-7", "url": "https://example.org/7", "fluency_prob": 0.5}
    picture = {"width": 16, "height": 16, "img_url_sha": "x"}
    rows = [
        {
            "general_metadata": general,
            "images": [None, url(1)],
            "texts": ["Text.", None],
            "metadata": [None, picture],
        },
        {
            "general_metadata": json.dumps(general),
            "images": [url(2), None],
            "texts": [None, "Text."],
            "metadata": None,
        },
    ]
    write_parquet(run.source / "a.parquet", rows[:1])
    write_parquet(run.source / "b.parquet", rows[1:])
    found = run("omnicorpus", run.source, images_dir=tmp_path / "images")
    assert [sample.id for sample in found] == ["set:doc-7", "set:doc-7"]
    assert found[0].content == (Text("Text."), Image("img0.png", 16, 16))
    assert found[0].meta["url"] == "https://example.org/7"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mmc4(layout: Fetched, run: Run, tmp_path: Path) -> None:
    layout(tmp_path / "images", [1, 2])
    info = [
        {"image_name": "x.png", "raw_url": url(2), "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "y.png", "raw_url": url(1), "matched_text_index": 0},
        {"image_name": "z.png", "raw_url": url(9), "matched_text_index": 1},
    ]
    record = {
        "text_list": ["First.", "Second.", "Third."],
        "image_info": info,
        "url": "https://example.org",
    }
    wrong = {**record, "image_info": [{**info[0], "matched_text_index": 3}]}
    found = run(
        "mmc4", run.lines(record, wrong, {"text_list": "x"}), images_dir=tmp_path / "images"
    )
    content = (
        Image("img0.png", 16, 16),
        Text("First. Second."),
        Image("img1.png", 16, 16),
        Text("Third."),
    )
    assert [sample.content for sample in found] == [content]
    assert run.dataset.member(0, "img0.png") == png(16, 16, 1)
    assert run.skipped == [
        ("records.jsonl:1", "matched_text_index outside the text"),
        ("records.jsonl:2", "no text_list"),
    ]


def test_nothing_is_fetched(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    record = {"text_list": ["Text."], "image_info": [{"raw_url": url(1), "matched_text_index": 0}]}
    assert run("mmc4", run.lines(record))[0].content == (Text("Text."),)


@pytest.mark.parametrize("damage", ["header", "end", "cut"])
def test_a_damaged_tar_of_fetched_pictures_is_no_silent_loss(
    damage: str, run: Run, tmp_path: Path
) -> None:
    fetched_as_tars(tmp_path / "images", [1, 2, 3, 4, 5, 6])
    path = tmp_path / "images" / "00000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[3].offset
    if damage == "header":
        data[offset : offset + 40] = b"\xff" * 40
    end = {
        "header": len(data),
        "end": len(bytes(data).rstrip(b"\0")) // 512 * 512 + 512,
        "cut": offset + 700,
    }[damage]
    path.write_bytes(data[:end])
    record = {"text_list": ["Text."], "image_info": [{"raw_url": url(1), "matched_text_index": 0}]}
    with pytest.raises(
        UserError, match=r"--images-dir: .*00000\.tar is damaged: .*: fetch it again or remove it"
    ):
        run("mmc4", run.lines(record), images_dir=tmp_path / "images")


# ---- Hugging Face


def rows_of_pictures() -> list[dict[str, Any]]:
    return [
        {"jpg": {"bytes": png(8, 8, number), "path": None}, "said": f"number {number}", "n": number}
        for number in range(5)
    ]


def test_hugging_face_parquet(run: Run) -> None:
    write_parquet(
        run.source / "data" / "train-00000.parquet",
        [*rows_of_pictures(), {"jpg": None, "said": " ", "n": 9}],
    )
    found = run("hf", run.source, columns={"image": "jpg", "text": "said", "id": "n"})
    assert [sample.content for sample in found] == [
        (Image("img0.png", 8, 8), Text(f"number {n}")) for n in range(5)
    ]
    assert [sample.id for sample in found] == [f"set:{n}" for n in range(5)]
    assert run.dataset.member(3, "img0.png") == png(8, 8, 3)
    assert run.skipped == [("train-00000.parquet:5", "no text")]


def test_hugging_face_chats_and_questions(run: Run) -> None:
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "This."}]
    write_parquet(
        run.source / "a.parquet",
        [{"images": [{"bytes": png(8, 8), "path": "a.png"}], "messages": turns}],
    )
    write_parquet(
        run.source / "b.parquet", [{"image": png(8, 8), "query": "Why?", "answer": "So."}]
    )
    found = run("hf", run.source)
    assert found[0].messages[0].content == (Image("img0.png", 8, 8), Text("What?"))
    assert found[1].messages == (
        Message("user", (Image("img0.png", 8, 8), Text("Why?"))),
        Message("assistant", (Text("So."),)),
    )


def test_hugging_face_saved_to_disk(run: Run) -> None:
    """The layout of `save_to_disk`: Arrow streams named in state.json; made by the library itself where it is installed."""
    pyarrow = pytest.importorskip("pyarrow")
    folder, rows = run.source / "train", rows_of_pictures()
    try:
        import datasets
    except ImportError:
        folder.mkdir()
        names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
        for name, part in zip(names, (rows[:3], rows[3:]), strict=True):
            table = pyarrow.Table.from_pylist(part)
            with pyarrow.ipc.new_stream(str(folder / name), table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        (folder / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None})
        )
    else:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        datasets.Dataset.from_dict(columns).save_to_disk(str(folder), num_shards=2)
    found = run("hf", folder, columns={"image": "jpg", "text": "said"}, samples=2)
    assert [sample.content[1] for sample in found] == [Text(f"number {n}") for n in range(5)]
    assert [run.dataset.member(n, "img0.png") for n in range(5)] == [png(8, 8, n) for n in range(5)]


def test_hugging_face_needs_one_split_and_known_columns(run: Run) -> None:
    run.put("dataset_dict.json", "{}")
    run.put("train/state.json", "{}")
    with pytest.raises(UserError, match=r"holds the splits train: give the folder of one"):
        run("hf", run.source)
    path = write_parquet(run.source / "a.parquet", rows_of_pictures())
    with pytest.raises(UserError, match=r"no column 'jpeg': there are jpg, said, n"):
        run("hf", path, columns={"image": "jpeg"})


# ---- folders, texts, tars


def test_folder_with_captions_beside(run: Run) -> None:
    run.put("b/two.jpg", png(8, 8, 2))
    run.put("b/two.jpg.txt", "  the second\n")
    run.put("a/one.png", png(8, 8, 1))
    run.put("a/one.caption", "the first")
    run.put("none.png", png(8, 8))
    run.put("bytes.png", png(8, 8))
    run.put("bytes.txt", b"\xff\xfe")
    run.put("notes.md", "not a picture")
    found = run("folder", run.source)
    assert [(sample.id, sample.content) for sample in found] == [
        ("set:a/one.png", (Image("img0.png", 8, 8), Text("the first"))),
        ("set:b/two.jpg", (Image("img0.png", 8, 8), Text("the second"))),
    ]
    assert run.skipped == [("bytes.png", "no caption"), ("none.png", "no caption")]


def test_folder_with_a_metadata_file(run: Run) -> None:
    run.put("x/a.png", png(8, 8))
    lines = [
        {"file_name": "x/a.png", "text": "an a"},
        {"file_name": "../b.png", "text": "b"},
        {"file_name": "x/a.png"},
    ]
    run.put("metadata.jsonl", "\n".join(map(json.dumps, lines)))
    assert [sample.content[1] for sample in run("folder", run.source)] == [Text("an a")]
    assert [reason for _, reason in run.skipped] == ["refused reference with ..", "no caption"]


def test_plain_texts(run: Run) -> None:
    path = run.put(
        "texts.jsonl",
        '{"text": "one", "id": "x", "kind": "blog"}\n\n{"text": ""}\nnot json\n{"text": "two \u00e9"}\n\xff'.encode(),
    )
    found = run("jsonl", path)
    assert [(sample.id, sample.content) for sample in found] == [
        ("set:x", (Text("one"),)),
        ("set:texts.jsonl:3", (Text("two \u00e9"),)),
    ]
    assert [reason for _, reason in run.skipped] == ["no text", "not valid JSON", "not valid JSON"]


def test_our_own_schema_with_files(run: Run) -> None:
    picture = Pillow.new("RGB", (60, 40), "white")
    picture.paste((255, 0, 0), (10, 5, 25, 20))
    exif = Pillow.Exif()
    exif[0x0112] = 6
    stored = io.BytesIO()
    Pillow.fromarray(np.ascontiguousarray(np.rot90(np.asarray(picture)))).save(
        stored, "PNG", exif=exif
    )
    run.put("turned.png", stored.getvalue())
    box = {"type": "box", "image": 0, "xyxy": [10, 5, 25, 20], "label": "red"}
    image = {"type": "image", "file": "turned.png", "max_pixels": 4096}
    turns = [
        {"role": "user", "content": [image]},
        {"role": "assistant", "loss": 0.5, "content": [box]},
    ]
    record = {
        "id": "x:1",
        "kind": "chat",
        "messages": turns,
        "task": "grounding",
        "meta": {"license": "mine"},
    }
    sideways = [{"role": "user", "content": [{**image, "w": 40, "h": 60}]}, turns[1]]
    found = run(
        "jsonl", run.lines(record, {**record, "messages": sideways}, {**record, "kind": "neither"})
    )
    (sample,) = found
    assert (sample.id, sample.task, sample.messages[1].loss) == ("x:1", "grounding", 0.5)
    assert sample.images == (Image("img0.png", 60, 40, max_pixels=4096),)
    assert sample.meta["changed"] == {"img0.png": "EXIF orientation 6 applied; stored as PNG"}
    pixels = np.asarray(Pillow.open(io.BytesIO(run.dataset.member(0, "img0.png"))))
    (marked,) = [element for element in sample.elements if isinstance(element, Box)]
    x1, y1, x2, y2 = (int(value) for value in marked.xyxy)
    assert (pixels[y1:y2, x1:x2] == (255, 0, 0)).all()
    assert (pixels == (255, 0, 0)).all(2).sum() == (y2 - y1) * (x2 - x1)
    assert [reason for _, reason in run.skipped] == ["boxes of another size", "breaks the schema"]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_webdataset_made_elsewhere(run: Run) -> None:
    """Written by the webdataset package."""
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(run.source / "a.tar")) as tar:
        tar.write({"__key__": "one", "png": png(8, 8, 1), "txt": "said"})
        tar.write(
            {
                "__key__": "sub/two",
                "jpg": png(8, 8, 2),
                "json": {"caption": "in json", "url": "https://x.org"},
            }
        )
        tar.write({"__key__": "three", "png": png(8, 8, 3)})
        tar.write({"__key__": "four", "txt": "no picture"})
        content = [
            {"type": "image", "ref": "a.png", "w": 8, "h": 8},
            {"type": "text", "text": "said"},
        ]
        document = {"v": 1, "id": "own:1", "kind": "doc", "content": content}
        tar.write({"__key__": "five", "json": document, "a.png": png(8, 8, 5)})
        tar.write({"__key__": "six", "json": document, "b.png": png(8, 8, 5)})
    found = run("webdataset", run.source)
    assert [sample.id for sample in found] == ["set:a.tar:one", "set:a.tar:sub/two", "own:1"]
    assert [sample.content[-1] for sample in found[:2]] == [Text("said"), Text("in json")]
    assert found[1].meta["url"] == "https://x.org"
    assert [run.dataset.member(n, "img0.png") for n in range(3)] == [
        png(8, 8, n) for n in (1, 2, 5)
    ]
    assert run.skipped == [
        ("a.tar:three", "no caption"),
        ("a.tar:four", "no picture or video"),
        ("a.tar:six", "no such member"),
    ]


def test_a_damaged_tar_costs_what_is_damaged(run: Run) -> None:
    with tarfile.open(run.source / "a.tar", "w") as tar:
        for number in range(6):
            add(tar, f"{number}.png", png(8, 8, number))
            add(tar, f"{number}.txt", b"said")
    data = bytearray((run.source / "a.tar").read_bytes())
    with tarfile.open(run.source / "a.tar") as tar:
        place = tar.getmember("2.png").offset
    data[place : place + 100] = b"\xff" * 100
    (run.source / "a.tar").write_bytes(data)
    found = run("webdataset", run.source / "a.tar")
    assert [sample.id for sample in found] == [f"set:a.tar:{number}" for number in (0, 1, 3, 4, 5)]
    assert sorted(reason for _, reason in run.skipped) == ["damaged tar", "no picture or video"]


# ---- large JSON files


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("shape", ["array", "indented", "lines", "marked"])
def test_json_is_read_in_parts_as_at_once(
    shape: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the json module on the whole; read through a buffer smaller than a record."""
    monkeypatch.setattr("visionloom.data.convert.json_parts._CHUNK", 16)
    values = [
        {
            "n": n,
            "text": '\\"]}, [{' * (n % 5) + "\u00e9\u2028\U0001f600",
            "deep": [[{"a": [None]}]] * n,
        }
        for n in range(20)
    ]
    text = json.dumps(values, ensure_ascii=False, indent=3 if shape == "indented" else None)
    if shape in ("lines", "marked"):
        text = "\n \n".join(json.dumps(value, ensure_ascii=False) for value in values) + "\n" * 3
    path = tmp_path / "values.json"
    path.write_bytes(text.encode("utf-8-sig" if shape == "marked" else "utf-8"))
    parts = list(cut_json(path, size))
    assert [part.records for part in parts] == [
        min(size, 20 - first) for first in range(0, 20, size)
    ]
    found = [record for part in parts for record in read_json(part.where)]
    assert [record.value for record in found] == values
    assert [record.place for record in found] == [f"values.json:{n}" for n in range(20)]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"b": ]', '[{"a": 1}', "[", '[{"a": 1} x]', '[{"a"'])
def test_a_broken_array_is_an_error_with_its_place(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: not valid JSON.* byte \d+"):
        list(cut_json(tmp_path / "a.json", 10))


def test_an_array_of_many_chunks_is_not_kept_in_memory(tmp_path: Path) -> None:
    """Reference: tracemalloc."""
    import tracemalloc

    with open(tmp_path / "a.json", "w") as file:
        file.write(
            "[" + ",\n".join(json.dumps({"n": n, "text": "x" * 4000}) for n in range(8000)) + "]"
        )
    tracemalloc.start()
    records = sum(1 for part in cut_json(tmp_path / "a.json", 500) for _ in read_json(part.where))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (records, peak < 12 << 20) == (8000, True)


# ---- limits and errors


def test_many_small_files_share_shards(run: Run) -> None:
    for file in range(10):
        run.put(f"{file}.jsonl", "\n".join(json.dumps({"text": f"{file} {n}"}) for n in range(3)))
    found = run("jsonl", run.source, samples=7)
    assert [sample.content for sample in found] == [
        (Text(f"{file} {n}"),) for file in range(10) for n in range(3)
    ]
    assert [shard.samples for shard in run.dataset.shards] == [6, 6, 6, 6, 6]


def test_a_limit_counts_records(run: Run) -> None:
    path = run.lines(*({"text": f"number {n}"} for n in range(20)))
    assert len(run("jsonl", path, samples=3, limit=7)) == 7
    assert [shard.samples for shard in run.dataset.shards] == [3, 3, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"kind": "paper"}, "source kind=paper is unknown"),
        ({"path": Path("/nowhere")}, "no file or folder /nowhere"),
        ({"images_dir": Path("/nowhere")}, "--images-dir: no folder /nowhere"),
        ({"columns": {"text": "x"}}, "--columns is for the kind hf"),
        ({"kind": "hf", "columns": {"sound": "x"}}, r"--columns sound=\.\.\.: one of image, video"),
        ({"kind": "webdataset"}, "no sample could be converted"),
        ({"kind": "folder"}, "a folder of pictures expected"),
        ({"kind": "obelics"}, r"a file \.parquet, or a folder with some, expected"),
        ({"kind": "obelics", "path": "a.parquet"}, "is no parquet file that can be read"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(words: dict[str, Any], message: str, run: Run) -> None:
    path = run.put("a.json", '[{"text": "x"}]')
    run.put("a.parquet", "not parquet")
    kind, path = words.pop("kind", "jsonl"), run.source / words.pop("path", path)
    with pytest.raises(UserError, match=message) as caught:
        run(kind, path, **words)
    assert "\n" not in str(caught.value)


def test_a_failing_disk_is_not_taken_for_a_bad_record(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.put("a.png", png(8, 8))
    path = run.lines({"image": "a.png", "conversations": ASK})

    def fail(_: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        run("llava", path)


def test_the_result_does_not_lie_in_the_source(run: Run) -> None:
    run.put("a.jsonl", '{"text": "a"}')
    run.folder = run.source / "set"
    with pytest.raises(UserError, match="lies inside the source"):
        run("jsonl", run.source)


def test_a_skip_crosses_processes() -> None:
    import pickle

    skip = pickle.loads(pickle.dumps(Skip("why", "where")))
    assert (skip.reason, skip.detail, str(skip)) == ("why", "where", "why: where")
