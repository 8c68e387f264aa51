"""Shards for benchmarks, made alike on every machine: photograph-like JPEGs, interleaved documents, and H.264 clips.

    python benchmarks/data/synthetic.py FOLDER [--captions 1000] [--documents 100] [--clips 20]

makes FOLDER/{captions,documents,clips} and FOLDER/tokenizer, which recipes and other benchmarks read. What exists is kept.
"""

import argparse
import io
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2] / ".link")

import numpy as np
from PIL import Image as Pillow

from visionloom.data.demo.tokenizer import train_tokenizer
from visionloom.data.shards.manifest import MANIFEST
from visionloom.data.shards.sample import Image, Message, Sample, Text, Video
from visionloom.data.shards.write import write_shards

Pair = tuple[Sample, dict[str, bytes]]
AREA: Final = 290_000
"""Pixels of a photograph: the mean of web pictures after the usual filters."""
CLIP: Final = (360, 640)
"""Height and width of a clip's frames."""
CLIP_RATE: Final = 25
_WORDS: Final = (
    "a the of in on with under near two three red blue small large old young dog street house tree river table picture shows "
    "people sitting walking holding behind beside light morning evening market window boat bridge field road sky water stone"
)


@lru_cache(1)
def scenery() -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """A large picture uint8 [2400, 3200, 3] with structure on all scales, like nature's: amplitudes fall with frequency."""
    rng = np.random.default_rng(7)
    layers = np.zeros((2400, 3200, 3), np.float32)
    for step in (800, 400, 160, 80, 32, 16, 8, 4, 2, 1):
        coarse = rng.integers(0, 256, (2400 // step, 3200 // step, 3), np.uint8)
        fine = Pillow.fromarray(coarse).resize((3200, 2400), Pillow.Resampling.BICUBIC)
        layers += (np.asarray(fine, np.float32) - 128) * step**0.4
    layers = (layers - layers.mean()) / layers.std() * 55 + 120
    return layers.clip(0, 255).astype(np.uint8)


def photograph(number: int) -> tuple[bytes, int, int]:
    """A JPEG of about AREA pixels with its width and height: a piece of the scenery, of many shapes."""
    rng = np.random.default_rng(number)
    aspect = float(rng.uniform(0.6, 1.7))
    area = AREA * float(rng.lognormal(-0.08, 0.4))
    width, height = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    top, left = int(rng.integers(0, 2400 - height)), int(rng.integers(0, 3200 - width))
    file = io.BytesIO()
    Pillow.fromarray(scenery()[top : top + height, left : left + width]).save(
        file, "JPEG", quality=int(rng.integers(75, 93))
    )
    return file.getvalue(), width, height


def words(rng: np.random.Generator, count: int) -> str:
    """Words that make no sense."""
    return " ".join(rng.choice(_WORDS.split(), count).tolist()) + "."


def captions(count: int) -> Iterator[Pair]:
    """Chats of one photograph, a question and a caption."""
    for number in range(count):
        rng = np.random.default_rng([1, number])
        data, width, height = photograph(number)
        asked = Message(
            "user", (Image("img0.jpg", width, height), Text("What does the picture show?"))
        )
        said = Message("assistant", (Text(words(rng, int(rng.integers(8, 80)))),))
        yield (
            Sample(f"captions:{number}", "chat", (asked, said), meta={"source": "synthetic"}),
            {"img0.jpg": data},
        )


def documents(count: int) -> Iterator[Pair]:
    """Interleaved documents of one to eight photographs among paragraphs."""
    for number in range(count):
        rng = np.random.default_rng([2, number])
        content: list[Any] = [Text(words(rng, 40))]
        media = {}
        for place in range(int(rng.integers(1, 9))):
            name = f"img{place}.jpg"
            media[name], width, height = photograph(1_000_000 + 8 * number + place)
            content += [Image(name, width, height), Text(words(rng, int(rng.integers(20, 200))))]
        yield (
            Sample(
                f"documents:{number}", "doc", content=tuple(content), meta={"source": "synthetic"}
            ),
            media,
        )


def clip(number: int, seconds: float, preset: str = "fast") -> bytes:
    """An H.264 file with B-frames: a camera that pans and zooms over the scenery, with a cut every four seconds."""
    import av

    height, width = CLIP
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(
            "libx264", rate=CLIP_RATE, options={"preset": preset, "threads": "1"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(round(seconds * CLIP_RATE)):
            scene = np.random.default_rng([3, number, index // (4 * CLIP_RATE)])
            (top, left), (down, right) = scene.integers(0, (1200, 1600)), scene.uniform(-4, 4, 2)
            moved = index % (4 * CLIP_RATE)
            top, left = int(top + down * moved) % 1900, int(left + right * moved) % 2500
            frame = av.VideoFrame.from_ndarray(
                scenery()[top : top + height, left : left + width].copy(), format="rgb24"
            )
            frame.pts, frame.time_base = index, Fraction(1, CLIP_RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def clips(count: int) -> Iterator[Pair]:
    """Chats of one clip of 3 to 25 seconds."""
    height, width = CLIP
    for number in range(count):
        rng = np.random.default_rng([4, number])
        seconds = round(float(rng.uniform(3, 25)), 1)
        frames = round(seconds * CLIP_RATE)
        facts = {
            "ref": "vid0.mp4",
            "file_frames": frames,
            "fps": float(CLIP_RATE),
            "duration": frames / CLIP_RATE,
        }
        video = Video((), (), width, height, **facts)  # type: ignore[arg-type]
        asked, said = (
            Message("user", (video, Text("What happens?"))),
            Message("assistant", (Text(words(rng, 60)),)),
        )
        yield Sample(f"clips:{number}", "chat", (asked, said)), {"vid0.mp4": clip(number, seconds)}


def make(folder: Path, **counts: int) -> Path:
    """Make the datasets that are not there yet, `captions`, `documents` or `clips` with their numbers of samples."""
    makers = {"captions": captions, "documents": documents, "clips": clips}
    for name, count in counts.items():
        if not (folder / name / MANIFEST).exists():
            write_shards(folder / name, name, makers[name](count))
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(folder / "tokenizer", _texts())
    return folder


def _texts() -> Iterable[Sample]:
    rng = np.random.default_rng(5)
    return [Sample(f"t{number}", "doc", content=(Text(words(rng, 200)),)) for number in range(50)]


def main() -> None:
    """Parse the command line and make the datasets."""
    parser = argparse.ArgumentParser(description="make synthetic shards for benchmarks")
    parser.add_argument("folder", type=Path)
    for name, count in (("captions", 1000), ("documents", 100), ("clips", 20)):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"samples (default {count})")
    arguments = vars(parser.parse_args())
    print(make(arguments.pop("folder"), **arguments))


if __name__ == "__main__":
    main()
