"""Row 30 of the fault matrix: without an optional package, what does not need it works and the rest names the extra to install.

Reference: setup.py's extras, and Python's own refusal to import a module that sys.modules has as None.
"""

import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from visionloom.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HIDE = "import sys; sys.modules.update(dict.fromkeys({names!r})); "


def tensorboard(folder: Path) -> None:
    from visionloom.train.observe.logging_config import LoggingConfig
    from visionloom.train.observe.trackers import Trackers

    Trackers(LoggingConfig(tensorboard=True), folder, {}, "run")


def parquet(folder: Path) -> None:
    from visionloom.launch.data import make_parser

    (folder / "in").mkdir()
    (folder / "in" / "a.parquet").write_bytes(b"PAR1")
    options = make_parser().parse_args(["convert", "hf", str(folder / "in"), str(folder / "out")])
    options.run(options)


def videos(folder: Path) -> None:
    from visionloom.data.encode.video import decode_frames
    from visionloom.data.shards.sample import Video

    element = Video((), (), 64, 64, "v.mp4", 20, 10.0, 2.0)
    list(
        decode_frames(
            b"\0\0\0\x18ftypmp42" + bytes(100),
            element,
            np.array([0]),
            [0.0],
            "s",
        )
    )


def demo(folder: Path) -> None:
    from visionloom.data.demo.make import make_demo

    make_demo(folder / "demo")


@pytest.mark.parametrize(
    ("use", "module", "extra"),
    [
        (tensorboard, "tensorboard", "tensorboard"),
        (parquet, "pyarrow", "convert"),
        (videos, "av", "video"),
        (demo, "sklearn", "demo"),
    ],
)
def test_the_extra_is_named(
    use: Callable[[Path], None],
    module: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == module else found(name, *rest),
    )
    with pytest.raises(UserError, match=rf"pip install '?visionloom\[{extra}\]"):
        use(tmp_path)


def test_commands_start_without_any_of_them() -> None:
    """`--help` and the composing of a run, in a process that has none of the optional packages."""
    names = [
        "tensorboard",
        "pyarrow",
        "av",
        "sklearn",
        "s3fs",
        "simplejpeg",
        "deepspeed",
        "flash_attn",
        "wandb",
    ]
    code = HIDE.format(names=names) + (
        "from visionloom.launch.configure import compose; assert compose(['+recipe=demo'], 2).run.name == 'demo';"
        "import visionloom.launch.data, visionloom.train.observe.trackers, visionloom.data.encode.patches"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / ".link")},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()


def test_pictures_are_the_same_without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one package whose place another takes."""
    from visionloom.data.encode import image

    file = BytesIO()
    Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(
        file, "JPEG", quality=95
    )
    quick = image.decode_image(file.getvalue(), (40, 60), "s", "a.jpg")
    monkeypatch.setattr(image, "simplejpeg", None)
    np.testing.assert_array_equal(
        image.decode_image(file.getvalue(), (40, 60), "s", "a.jpg"), quick
    )
