"""Real pictures and a real video, from files to a page: convert, index, verify, count lengths, view.

The pictures are those inside scikit-image's package; the video shows one of them moving, in H.264 with B-frames.
"""

import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from visionloom.data.config import MediaConfig
from visionloom.data.demo.tokenizer import train_tokenizer
from visionloom.data.encode.encode import encode
from visionloom.data.encode.patches import decode_patches
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.encode.video import decode_frames
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Image, Text, Video
from visionloom.launch.data import main
from visionloom.tests.data.samples import essay, picture_question
from visionloom.tests.data.samples import film as film_of_frames

FRAMES, RATE = 75, 25


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of scikit-image's packaged pictures, with a caption each; one lies on its side as a camera stores it."""
    package = Path(pytest.importorskip("skimage.data").__file__).parent
    folder = tmp_path_factory.mktemp("pictures")
    for path in sorted(package.iterdir()):
        if path.suffix in (".png", ".jpg", ".tif", ".gif"):
            shutil.copyfile(path, folder / path.name)
            (folder / f"{path.stem}.txt").write_text(f"A picture named {path.stem}.")
    exif = Pillow.Exif()
    exif[0x0112] = 8
    with Pillow.open(folder / "rocket.jpg") as rocket:
        rocket.transpose(Pillow.Transpose.ROTATE_270).save(
            folder / "rocket.jpg", exif=exif, quality=95
        )
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with Qwen's special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder, [picture_question(1)[0], film_of_frames(1)[0], essay(1)[0]])
    return folder


@pytest.fixture(scope="module")
def film(pictures: Path) -> Path:
    """Three seconds: a window that moves over the astronaut, 320 x 240 pixels at 25 frames per second."""
    av = pytest.importorskip("av")
    pixels = np.asarray(Pillow.open(pictures / "astronaut.png").convert("RGB"))
    with av.open(str(pictures / "film.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.codec_context.max_b_frames = 3
        for number in range(FRAMES):
            window = np.ascontiguousarray(
                pixels[2 * number : 2 * number + 240, 2 * number : 2 * number + 320]
            )
            container.mux(stream.encode(av.VideoFrame.from_ndarray(window, format="rgb24")))
        container.mux(stream.encode())
    (pictures / "film.mp4").rename(pictures.parent / "film.mp4")
    return pictures.parent / "film.mp4"


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def test_a_folder_of_pictures(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    run(
        "convert",
        "folder",
        pictures,
        folder,
        "--samples-per-shard",
        10,
        "--shard-size",
        "3MiB",
        "--workers",
        2,
    )
    said = capsys.readouterr().out
    dataset = Dataset.open(folder, "pictures")
    files = [
        path for path in sorted(pictures.iterdir()) if path.suffix != ".txt" and is_readable(path)
    ]
    assert f"{len(files)} samples" in said and "3 pictures changed" in said
    assert len(dataset) == len(files) >= 20
    assert all(shard.bytes <= 3 << 20 and shard.samples <= 10 for shard in dataset.shards)
    for index, path in enumerate(files):
        check_picture(dataset, index, path)
    verify_and_index_again(folder)


def is_readable(path: Path) -> bool:
    """Whether Pillow reads it: there is a TIFF of three pages in one that it does not know."""
    try:
        Pillow.open(path).load()
    except OSError:
        return False
    return True


def check_picture(dataset: Dataset, index: int, path: Path) -> None:
    """Reference: Pillow on the original file; the bytes are the original's unless meta says otherwise."""
    sample = dataset.sample(index)
    (image,), (text,) = sample.images, sample.content[1:]
    assert (sample.id, text) == (f"pictures:{path.name}", Text(f"A picture named {path.stem}."))
    stored, original = dataset.member(index, image.ref), Pillow.open(path)
    if "changed" not in sample.meta:
        assert stored == path.read_bytes() and (image.width, image.height) == original.size
        return
    turned = path.name == "rocket.jpg"
    assert turned or original.has_transparency_data
    assert (image.width, image.height) == (original.size[::-1] if turned else original.size)
    found = Pillow.open(io.BytesIO(stored))
    assert found.size == (image.width, image.height) and not found.has_transparency_data


def verify_and_index_again(folder: Path) -> None:
    """What the converter wrote is what `index` finds, and every member decodes."""
    before = (folder / "dataset.json").read_bytes()
    run("verify", folder, "--decode", "--workers", 1)
    run("index", folder, "--force", "--workers", 1)
    assert (folder / "dataset.json").read_bytes() == before


@pytest.fixture
def chats(film: Path, pictures: Path, tmp_path: Path) -> Path:
    """A dataset by `convert llava` of one question about the video and one about a picture."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(film, source / "film.mp4")
    shutil.copyfile(pictures / "chelsea.png", source / "cat.png")
    turns = [
        {"from": "human", "value": "<video>\nWho?"},
        {"from": "gpt", "value": 'An <astronaut> & "friends" \u6771\u4eac'},
    ]
    cat = [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "</span><script>alert(1)</script>"},
    ]
    records = [
        {"id": 1, "video": "film.mp4", "conversations": turns},
        {"id": 2, "image": "cat.png", "conversations": cat},
    ]
    (source / "chats.json").write_text(json.dumps(records))
    run("convert", "llava", source / "chats.json", tmp_path / "chats", "--workers", 1)
    return tmp_path / "chats"


def test_a_video_is_trained_on_as_it_was_made(
    chats: Path, film: Path, pictures: Path, tokenizer_folder: Path
) -> None:
    """Reference: the pixels that were encoded, 75 frames at 25 a second."""
    dataset = Dataset.open(chats, "chats")
    (video,) = [element for element in dataset.sample(0).elements if isinstance(element, Video)]
    assert (video.file_frames, video.fps, video.width, video.height, video.times) == (
        FRAMES,
        RATE,
        320,
        240,
        (),
    )
    assert video.duration == pytest.approx(FRAMES / RATE, abs=0.01)
    assert dataset.member(0, "vid0.mp4") == film.read_bytes()
    verify_and_index_again(chats)
    encoded = encode(dataset.sample(0), Tokenizer(str(tokenizer_folder)), MediaConfig())
    assert (
        len(decode_patches(encoded, lambda ref: dataset.member(0, ref), MediaConfig()))
        == encoded.patch_count
    )
    astronaut = np.asarray(Pillow.open(pictures / "astronaut.png").convert("RGB")).astype(int)
    wanted = np.array([0, 31, 32, 33, 74])
    found = decode_frames(
        dataset.member(0, "vid0.mp4"), video, wanted, (wanted / RATE).tolist(), "x"
    )
    for number, pixels in zip(wanted.tolist(), found, strict=True):
        windows = [astronaut[2 * n : 2 * n + 240, 2 * n : 2 * n + 320] for n in range(FRAMES)]
        assert np.argmin([np.abs(pixels - window).mean() for window in windows]) == number
    run("lengths", chats, "--tokenizer", tokenizer_folder, "--processes", 1)


def test_webdataset_streams_the_result(chats: Path) -> None:
    """Reference: the webdataset package."""
    webdataset = pytest.importorskip("webdataset")
    rows = list(
        webdataset.WebDataset([str(path) for path in chats.glob("*.tar")], shardshuffle=False)
    )
    assert [sorted(name for name in row if not name.startswith("__")) for row in rows] == [
        ["json", "vid0.mp4"],
        ["img0.png", "json"],
    ]
    assert [json.loads(row["json"])["id"] for row in rows] == ["chats:1", "chats:2"]


# ---- view


class Page(HTMLParser):
    """What a browser would find: tags, links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.styles: dict[str, str] = {}
        self.text, self.open = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or ""
            for name, value in attributes
            if name in ("src", "href", "srcset", "action", "data")
        ]
        assert not [name for name, _ in attributes if name.startswith("on")]
        self.open = dict(attributes).get("style") or ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and data.strip():
            self.styles[data] = self.open
        self.open = ""


def view(*words: object) -> Page:
    run("view", *words)
    (out,) = [Path(str(word)) for word in words if str(word).endswith(".html")]
    return Page(out.read_text(encoding="utf-8"))


def test_the_page_is_whole_and_safe(chats: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Reference: Python's HTML parser."""
    page = view(
        chats, "--tokenizer", tokenizer_folder, "--pack", 2048, "--out", tmp_path / "page.html"
    )
    assert not {"script", "iframe", "link", "object", "embed", "form", "base"} & set(page.tags)
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    assert (
        "</span><script>alert(1)</script>" in page.text
        and 'An <astronaut> & "friends" \u6771\u4eac' in page.text
    )
    assert page.text.count("0.00 s") == 1 and "2.96 s" in page.text
    encoded = [
        encode(Dataset.open(chats, "x").sample(n), Tokenizer(str(tokenizer_folder)), MediaConfig())
        for n in (0, 1)
    ]
    for sample in encoded:
        assert (
            f"{len(sample.input_ids):,} tokens" in page.text
            and f"{sample.supervised_tokens:,} supervised" in page.text
        )
    total = sum(len(sample.input_ids) for sample in encoded)
    assert f"2 samples, {total:,} tokens, {2048 - total:,} free" in page.text
    assert "of the first 2, 0 are too long" in page.text
    longest = max(len(sample.input_ids) for sample in encoded)
    page = view(
        chats,
        "--tokenizer",
        tokenizer_folder,
        "--pack",
        longest - 1,
        "--out",
        tmp_path / "page.html",
    )
    assert "of the first 2, 1 are too long" in page.text and "pack 0: 1 samples" in page.text


def test_tokens_are_coloured_where_the_loss_is(
    chats: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Reference: the weights that training uses."""
    tokenizer = Tokenizer(str(tokenizer_folder))
    page = view(chats, 1, "--tokenizer", tokenizer_folder, "--out", tmp_path / "page.html")
    encoded = encode(Dataset.open(chats, "x").sample(1), tokenizer, MediaConfig())
    supervised = {
        tokenizer.decode([token], keep_special=True)
        for token in encoded.input_ids[encoded.target_weights > 0]
    }
    others = {
        tokenizer.decode([token], keep_special=True)
        for token in encoded.input_ids[encoded.target_weights == 0]
    }
    coloured = {text for text, style in page.styles.items() if "--loss" in style} - {"in the loss"}
    assert coloured == supervised and "<|im_start|>" in others - coloured


def test_samples_by_key_and_by_number(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = Dataset.open(chats, "x").keys[1]
    page = view(chats, key, "--out", tmp_path / "page.html")
    assert "chats:2" in page.text and "chats:1" not in page.text
    for words, message in (
        (["nothing"], "no sample 'nothing': give a key, or a number below 2"),
        (["--out", "page.pdf"], "a name ending in .html or .png expected"),
        (["--pack", "100"], "--pack LENGTH: a number of tokens, with --tokenizer"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["view", str(chats), *words])
        assert caught.value.code == 2 and message in capsys.readouterr().err


def test_boxes_lie_where_the_sample_says(tmp_path: Path) -> None:
    """A blue square under its box: in the page as a rectangle of its pixels, in the PNG with a red line around it."""
    picture = Pillow.new("RGB", (200, 100), "white")
    picture.paste((0, 0, 255), (40, 20, 120, 80))
    picture.save(tmp_path / "a.png")
    elements = [
        {"type": "image", "file": "a.png"},
        {"type": "box", "image": 0, "xyxy": [40, 20, 120, 80], "label": "a <b>"},
        {"type": "box", "image": 0, "xyxy": [200, 200, 600, 800], "space": "relative1000"},
        {"type": "point", "image": 0, "xy": [80, 50]},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "x", "kind": "doc", "content": elements}))
    run("convert", "jsonl", tmp_path / "a.jsonl", tmp_path / "set", "--workers", 1)
    page = view(tmp_path / "set", "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("<rect x='40.0' y='20.0' width='80.0' height='60.0'") == 2
    assert "<circle cx='80.0' cy='50.0'" in text and "a <b>" in page.text
    run("view", tmp_path / "set", "--out", tmp_path / "page.png")
    pixels = np.asarray(Pillow.open(tmp_path / "page.png").convert("RGB")).astype(int)
    blue = np.argwhere((pixels[..., 2] > 200) & (pixels[..., 0] < 60))
    red = np.argwhere((pixels[..., 0] > 150) & (pixels[..., 2] < 140) & (pixels[..., 1] < 140))
    assert (
        np.abs(red.min(0) - blue.min(0)).max() <= 3 and np.abs(red.max(0) - blue.max(0)).max() <= 3
    )


def test_a_broken_member_is_shown_as_such(pictures: Path, tmp_path: Path) -> None:
    from visionloom.data.shards.sample import Sample
    from visionloom.data.shards.write import write_shards

    samples = [
        (Sample("x", "doc", content=(Image("a.png", 9, 9), Text("t"))), {"a.png": b"garbage"})
    ]
    write_shards(tmp_path / "set", "set", samples)
    page = view(tmp_path / "set", "--out", tmp_path / "page.html")
    assert "a.png cannot be decoded" in page.text
    run("view", tmp_path / "set", "--out", tmp_path / "page.png")


# ---- how the command ends


def test_the_summary_says_what_was_left_out_and_the_exit_code_whether_that_is_too_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"text": f"number {n}", "score": 0.5} for n in range(38)]
    source = tmp_path / "a.jsonl"
    source.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"text": ""}, {"text": 3}])
    )
    words = ["convert", "jsonl", str(source), "--workers", "1"]
    assert main([*words[:3], str(tmp_path / "five"), *words[3:]]) == 0
    said = capsys.readouterr().out
    assert (
        f"  2 of 40 records left out (5.0%), each in {tmp_path / 'five' / 'skipped.jsonl'}:\n    2 no text (first: a.jsonl:38)\n"
        in said
    )
    assert (
        "  keys that were not read, and so have no effect on training:\n    38 record key score (first: a.jsonl:0)\n"
        in said
    )
    assert main([*words[:3], str(tmp_path / "four"), *words[3:], "--max-left-out", "4%"]) == 1
    assert (
        "error: 2 of 40 records left out, more than --max-left-out 4%: mend the source by"
        in capsys.readouterr().err
    )
    assert (
        main([*words[:3], str(tmp_path / "four"), *words[3:], "--max-left-out", "0.05"]) == 0
    )  # the same dataset is complete
    assert "record key score (first: a.jsonl:0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shard-size", "big"], "--shard-size big: a size like 500MiB"),
        (["--samples-per-shard", "0"], "--samples-per-shard 0: at least 1 expected"),
        (["--workers", "0"], "--workers 0: at least 1 expected"),
        (["--max-left-out", "most"], "--max-left-out most: a share like 5% or 0.05"),
        (["--sequence-length", "9"], "--sequence-length needs --tokenizer FOLDER"),
        (["--tokenizer", "/nowhere"], "--tokenizer /nowhere: no tokenizer.json there"),
        (["--columns", "image"], "--columns image: ROLE=COLUMN expected"),
        (["--name", "a.b"], "dataset name 'a.b': letters, digits"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}')
    with pytest.raises(SystemExit) as caught:
        main(["convert", "jsonl", str(tmp_path / "a.jsonl"), str(tmp_path / "set"), *words])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "set").exists()
