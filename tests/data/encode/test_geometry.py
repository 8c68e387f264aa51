"""Sizes, frames, timestamps and coordinates, each rule by its name.

References: transformers' processors of Qwen2-VL and Qwen3-VL for `hf` and `hf_capped`, qwen_vl_utils for `qwen_utils`.
"""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from qwen_vl_utils import vision_process
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_reference
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_reference
from transformers.video_utils import VideoMetadata

from visionloom.common.errors import UserError
from visionloom.data.config import RULES, MediaConfig
from visionloom.data.encode.geometry import (
    chosen_frames,
    frame_size,
    frame_times,
    image_grid,
    image_size,
    limits_of,
    patch_timestamps,
    scale_coordinate,
    video_grid,
    video_layout,
    video_size,
)
from visionloom.data.shards.sample import Image, Video

SIDES = st.integers(1, 9000)
RATES = st.sampled_from([3.0, 10.0, 23.976, 24.0, 25.0, 29.97, 30000 / 1001, 60.0])
SECONDS = st.none() | st.floats(0, 300)
PUBLISHED, CAPPED, UTILS = (MediaConfig(rule=rule) for rule in RULES)
PATCH = 16


def clip(
    total: int, fps: float = 25.0, sides: tuple[int, int] = (720, 1280), **values: object
) -> Video:
    """A video file of constant frame rate."""
    whole = {"ref": "a.mp4", "file_frames": total, "fps": fps, "duration": total / fps}
    return Video((), (), sides[1], sides[0], **(whole | values))  # type: ignore[arg-type]


def extracted(times: list[float], sides: tuple[int, int] = (320, 320), **values: object) -> Video:
    return Video(
        tuple(f"{i}.png" for i in range(len(times))), tuple(times), sides[1], sides[0], **values
    )  # type: ignore[arg-type]


# ---- hf


@settings(max_examples=600, deadline=None)
@given(SIDES, SIDES, st.sampled_from([(65_536, 16_777_216), (1024, 4096), (3136, 1_003_520)]))
def test_image_size_is_transformers(height: int, width: int, limits: tuple[int, int]) -> None:
    try:
        expected = image_reference(height, width, 32, *limits)
    except ValueError:
        with pytest.raises(UserError, match="aspect ratio"):
            image_size(height, width, *limits)
    else:
        assert image_size(height, width, *limits) == expected


@settings(max_examples=600, deadline=None)
@given(st.integers(2, 900), SIDES, SIDES, st.sampled_from([(4096, 25_165_824), (131_072, 786_432)]))
def test_video_size_is_transformers(
    frames: int, height: int, width: int, limits: tuple[int, int]
) -> None:
    try:
        expected = video_reference(frames, height, width, 2, 32, *limits)
    except ValueError:
        with pytest.raises(UserError, match="aspect ratio"):
            video_size(frames, height, width, *limits)
    else:
        assert video_size(frames, height, width, *limits) == expected


class Shape:
    """What Qwen3VLVideoProcessor.resize looks at of a video's tensor."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape


@pytest.mark.parametrize("rules", [PUBLISHED, CAPPED], ids=lambda rules: rules.rule)
@settings(max_examples=300, deadline=None)
@given(st.integers(2, 900), SIDES, SIDES)
def test_frame_size_is_transformers(
    rules: MediaConfig, frames: int, height: int, width: int
) -> None:
    processor = Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 25_165_824})
    base, seen = type(processor).__mro__[1], list[SizeDict]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "resize", lambda self, image, size, resample: seen.append(size))
        video = clip(10_000, sides=(height, width))
        try:
            capped = rules.rule == "hf_capped"
            processor.resize(Shape(1, frames, 3, height, width), processor.size, 3, 32, 2, capped)  # type: ignore[arg-type]
        except ValueError:
            with pytest.raises(UserError, match="aspect ratio"):
                frame_size(video, frames, rules)
        else:
            assert frame_size(video, frames, rules) == (seen[0].height, seen[0].width)


@pytest.mark.parametrize(
    ("height", "width", "tokens"),
    [(1080, 1920, 2040), (100, 100, 64), (4320, 7680, 16320), (300, 500, 144), (20, 3000, 94)],
)
def test_visual_tokens_of_known_pictures(height: int, width: int, tokens: int) -> None:
    grid = image_grid(Image("a.png", width, height), PUBLISHED)
    assert grid[0] * grid[1] * grid[2] == 4 * tokens


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 30_000), RATES)
def test_frames_are_transformers(total: int, fps: float) -> None:
    reference = Qwen3VLVideoProcessor(fps=2, min_frames=4, max_frames=768)
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    np.testing.assert_array_equal(
        chosen_frames(clip(total, fps), PUBLISHED), reference.sample_frames(metadata)
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 3000), RATES)
def test_timestamps_are_transformers(total: int, fps: float) -> None:
    video = clip(total, fps)
    indices = chosen_frames(video, PUBLISHED)
    expected = Qwen3VLProcessor._calculate_timestamps(
        None, list(indices.tolist()), fps
    )  # it lengthens the list it is given
    grid, moments = video_layout(video, PUBLISHED)
    assert moments == expected
    assert grid == video_grid(video, PUBLISHED)
    assert len(moments) == grid[0] == -(-len(indices) // 2)


def test_timestamps_of_an_odd_number_of_frames() -> None:
    assert [f"{t:.1f}" for t in patch_timestamps([i / 3 for i in range(9)])] == [
        "0.2",
        "0.8",
        "1.5",
        "2.2",
        "2.7",
    ]


# ---- qwen_utils


@settings(max_examples=600, deadline=None)
@given(SIDES, SIDES)
def test_image_size_is_qwen_utils(height: int, width: int) -> None:
    try:
        expected = vision_process.smart_resize(height, width, 32)
    except ValueError:
        with pytest.raises(UserError, match="aspect ratio"):
            image_grid(Image("a.png", width, height), UTILS)
    else:
        assert image_grid(Image("a.png", width, height), UTILS) == (
            1,
            expected[0] // PATCH,
            expected[1] // PATCH,
        )


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 30_000), RATES, SECONDS, SECONDS)
def test_frames_are_qwen_utils(
    total: int, fps: float, start: float | None, end: float | None
) -> None:
    part = {"video_start": start, "video_end": end}
    video = clip(total, fps, start=start, end=end)
    try:
        first, last, count = vision_process.calculate_video_frame_range(part, total, fps)
        wanted = vision_process.smart_nframes({}, count, fps)
    except ValueError:
        with pytest.raises(UserError, match="at least 2 frames"):
            chosen_frames(video, UTILS)
    else:
        expected = torch.linspace(first, last, wanted).round().long().tolist()
        assert chosen_frames(video, UTILS).tolist() == expected
        assert frame_times(video, chosen_frames(video, UTILS)) == [
            index / fps for index in expected
        ]


@pytest.mark.parametrize("frames", [2, 7, 60, 299, 300, 301, 420, 768])
@settings(max_examples=60, deadline=None)
@given(height=st.integers(20, 5000), width=st.integers(20, 5000))
def test_frame_size_is_qwen_utils(frames: int, height: int, width: int) -> None:
    video = clip(10_000, sides=(height, width))
    with (
        pytest.MonkeyPatch.context() as patch
    ):  # the file is not read, the resizing not done: only its size is asked for
        shown = frames + frames % 2
        read = torch.empty(1, dtype=torch.uint8).expand(shown, 3, height, width)
        patch.setitem(
            vision_process.VIDEO_READER_BACKENDS, "torchvision", lambda ele: (read, {}, 2.0)
        )
        patch.setattr(vision_process, "get_video_reader_backend", lambda: "torchvision")
        sizes = list[list[int]]()
        resize = lambda clip, size, **_: sizes.append(size) or torch.empty(0)  # noqa: E731
        patch.setattr(vision_process.transforms.functional, "resize", resize)
        try:
            vision_process.fetch_video({"video": "a.mp4"}, image_patch_size=PATCH)
        except ValueError:
            with pytest.raises(UserError, match="aspect ratio"):
                frame_size(video, frames, UTILS)
        else:
            assert list(frame_size(video, frames, UTILS)) == sizes[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(8, 400), st.integers(8, 400))
def test_extracted_frames_are_qwen_utils(frames: int, height: int, width: int) -> None:
    pictures = [Pillow.new("RGB", (width, height))] * frames
    tensor = vision_process.fetch_video({"video": pictures}, image_patch_size=PATCH)
    grid = video_grid(extracted([i / 2 for i in range(frames)], (height, width)), UTILS)
    assert grid == (tensor.shape[0] // 2, tensor.shape[2] // PATCH, tensor.shape[3] // PATCH)


def test_a_picture_that_would_vanish_is_refused() -> None:
    assert 0 in vision_process.smart_resize(
        20, 3000, 32, 1024, 2048
    )  # a size that cannot be resized to
    with pytest.raises(UserError, match=r"3000x20 pixels are too narrow"):
        image_grid(
            Image("a.png", 3000, 20),
            MediaConfig(rule="qwen_utils", image_min_pixels=1024, image_max_pixels=2048),
        )


# ---- every rule


def test_own_limits_narrow_the_configured_ones() -> None:
    assert image_grid(Image("a.png", 1024, 1024, max_pixels=256 * 256), PUBLISHED) == (1, 16, 16)
    assert image_grid(Image("a.png", 1024, 1024, max_pixels=10**9), PUBLISHED) == (1, 64, 64)
    assert image_grid(Image("a.png", 32, 32, min_pixels=1), PUBLISHED) == (1, 16, 16)


@pytest.mark.parametrize("rules", [PUBLISHED, CAPPED, UTILS], ids=lambda rules: rules.rule)
@settings(max_examples=150, deadline=None)
@given(
    total=st.integers(2, 3000),
    fps=RATES,
    rate=st.floats(0.01, 100),
    most=st.integers(2, 2000),
    pixels=st.integers(4096, 10**9),
)
@example(total=84, fps=23.976, rate=1.0, most=2, pixels=6_741_106)  # 7 frames, compared as 8
def test_a_videos_own_limits_only_narrow(
    rules: MediaConfig, total: int, fps: float, rate: float, most: int, pixels: int
) -> None:
    free, own = (
        clip(total, fps),
        clip(total, fps, sample_fps=rate, max_frames=most, total_pixels=pixels),
    )
    frames, fewer = len(chosen_frames(free, rules)), len(chosen_frames(own, rules))
    assert fewer <= min(frames, most)
    # transformers may enlarge a video a little whose odd number of frames it compares as one more: it scales by the true
    # number, so that the limit holds all the same.
    alone = np.prod(frame_size(clip(total, fps, total_pixels=pixels), frames, rules))
    assert alone <= max(np.prod(frame_size(free, frames, rules)), pixels / frames)
    grid = video_grid(own, rules)
    if rules.rule == "hf":  # the others never go below a size of the frame
        # transformers takes 17 frames for 16, since Python rounds half to even, where nothing is made smaller.
        counted = min(fewer, round(fewer / 2) * 2)
        assert counted * grid[1] * grid[2] * PATCH**2 <= max(
            min(pixels, 25_165_824), counted * 4 * PATCH**2
        )


def test_values_left_out_are_the_rules_own() -> None:
    assert limits_of(PUBLISHED) == limits_of(
        MediaConfig(image_min_pixels=65_536, video_max_pixels=25_165_824)
    )
    assert limits_of(UTILS).image == (4 * 32**2, 16_384 * 32**2)
    assert limits_of(UTILS).video[1] == 2 * vision_process.MODEL_SEQ_LEN * 32 * 32 * 0.9
    with pytest.raises(
        UserError,
        match=r"data\.media\.rule=qwen is unknown \(did you mean qwen_utils\?\): use one of hf, hf_capped, qwen_utils",
    ):
        image_grid(Image("a.png", 10, 10), MediaConfig(rule="qwen"))


def test_extracted_frames_are_all_used_up_to_the_most() -> None:
    video = extracted([i / 30 for i in range(9)])
    assert chosen_frames(video, PUBLISHED).tolist() == list(range(9))
    assert chosen_frames(video, MediaConfig(video_max_frames=5)).tolist() == [0, 2, 4, 6, 8]
    assert video_grid(video, PUBLISHED)[0] == 5
    with pytest.raises(UserError, match="at least 2 frames"):
        video_grid(extracted([0.0]), PUBLISHED)
    slow = extracted([i / 4 for i in range(41)], sample_fps=1.0)
    found = frame_times(slow, chosen_frames(slow, PUBLISHED))
    assert np.abs(found - np.linspace(0, 10, 10)).max() <= 0.125


@pytest.mark.parametrize("rules", [PUBLISHED, CAPPED, UTILS], ids=lambda rules: rules.rule)
@settings(max_examples=100, deadline=None)
@given(total=st.integers(2, 3000), fps=st.sampled_from([10.0, 25.0, 60.0]))
def test_even_times_choose_as_many_frames_as_a_constant_rate(
    rules: MediaConfig, total: int, fps: float
) -> None:
    times = tuple(i / fps for i in range(total))
    given_times = Video(
        (), times, 64, 64, ref="a.mp4", file_frames=total, fps=fps, duration=total / fps
    )
    constant, variable = chosen_frames(clip(total, fps), rules), chosen_frames(given_times, rules)
    assert len(constant) == len(variable)
    assert np.abs(constant - variable).max() <= 1  # a tie may go either way
    assert (constant != variable).mean() < 0.6


def test_a_variable_rate_is_sampled_evenly_in_time() -> None:
    # One second at 50 frames a second, then nine at two: by number nearly all frames would be of the first second.
    times = [i / 50 for i in range(50)] + [1 + i / 2 for i in range(19)]
    video = Video(
        (), tuple(times), 64, 64, ref="a.mp4", file_frames=len(times), fps=6.9, duration=10.0
    )
    found = frame_times(video, chosen_frames(video, PUBLISHED))
    assert found[0] == 0.0
    assert found[-1] == 10.0
    assert np.diff(found).max() <= 1.0
    assert len(found) == len(set(found)) >= 18
    part = Video(
        (),
        tuple(times),
        64,
        64,
        ref="a.mp4",
        file_frames=len(times),
        fps=6.9,
        duration=10.0,
        start=2.0,
        end=6.1,
    )
    inside = frame_times(part, chosen_frames(part, PUBLISHED))
    assert inside[0] == 2.0
    assert inside[-1] == 6.0
    still = Video(
        (),
        (0.0, 0.02, 0.04, 0.06, 60.0),
        64,
        64,
        ref="a.mp4",
        file_frames=5,
        fps=0.1,
        duration=60.1,
    )
    assert len(chosen_frames(still, PUBLISHED)) == 4  # the fewest that the settings allow
    assert len(chosen_frames(still, UTILS)) == 4


def test_coordinates_are_thousandths_of_the_sides() -> None:
    assert [scale_coordinate(x, 640, "px") for x in (0, 320, 640, 641, -3)] == [
        0,
        500,
        1000,
        1000,
        0,
    ]
    assert scale_coordinate(123.4, 640, "relative1000") == 123
