"""Sizes, frames, timestamps and coordinates. Reference: transformers' processors of Qwen2-VL and Qwen3-VL."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as image_reference
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as video_reference
from transformers.video_utils import VideoMetadata

from visionloom.data.config import MediaConfig
from visionloom.data.geometry import (
    chosen_frames,
    frame_indices,
    image_grid,
    image_size,
    patch_timestamps,
    scale_coordinate,
    video_grid,
    video_size,
)
from visionloom.data.sample import Image, Video
from visionloom.parallel.errors import UserError

SIDES = st.integers(1, 9000)
PUBLISHED = MediaConfig()


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
def test_video_size_is_transformers(frames: int, height: int, width: int, limits: tuple[int, int]) -> None:
    try:
        expected = video_reference(frames, height, width, 2, 32, *limits)
    except ValueError:
        with pytest.raises(UserError, match="aspect ratio"):
            video_size(frames, height, width, *limits)
    else:
        assert video_size(frames, height, width, *limits) == expected


@pytest.mark.parametrize(
    ("height", "width", "tokens"), [(1080, 1920, 2040), (100, 100, 64), (4320, 7680, 16320), (300, 500, 144), (20, 3000, 94)]
)
def test_visual_tokens_of_known_pictures(height: int, width: int, tokens: int) -> None:
    grid = image_grid(Image("a.png", width, height), PUBLISHED)
    assert grid[0] * grid[1] * grid[2] == 4 * tokens


def test_own_limits_narrow_the_configured_ones() -> None:
    assert image_grid(Image("a.png", 1024, 1024, max_pixels=256 * 256), PUBLISHED) == (1, 16, 16)
    assert image_grid(Image("a.png", 1024, 1024, max_pixels=10**9), PUBLISHED) == (1, 64, 64)
    assert image_grid(Image("a.png", 32, 32, min_pixels=1), PUBLISHED) == (1, 16, 16)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.sampled_from([10.0, 23.976, 24.0, 25.0, 29.97, 60.0]))
def test_frames_are_transformers(total: int, fps: float) -> None:
    reference = Qwen3VLVideoProcessor(fps=2, min_frames=4, max_frames=768)
    metadata = VideoMetadata(total_num_frames=total, fps=fps)
    np.testing.assert_array_equal(frame_indices(total, fps, PUBLISHED), reference.sample_frames(metadata))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.sampled_from([24.0, 29.97, 3.0]))
def test_timestamps_are_transformers(indices: list[int], fps: float) -> None:
    expected = Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps)
    assert patch_timestamps([index / fps for index in indices]) == expected


def test_extracted_frames_are_all_used_up_to_the_most() -> None:
    video = Video(tuple(f"{i}.png" for i in range(9)), tuple(i / 30 for i in range(9)), 320, 320)
    assert chosen_frames(video, PUBLISHED).tolist() == list(range(9))
    assert chosen_frames(video, MediaConfig(video_max_frames=5)).tolist() == [0, 2, 4, 6, 8]
    assert video_grid(video, PUBLISHED)[0] == 5
    with pytest.raises(UserError, match="at least 2 frames"):
        video_grid(Video(("a.png",), (0.0,), 320, 320), PUBLISHED)


def test_coordinates_are_thousandths_of_the_sides() -> None:
    assert [scale_coordinate(x, 640, "px") for x in (0, 320, 640, 641, -3)] == [0, 500, 1000, 1000, 0]
    assert scale_coordinate(123.4, 640, "relative1000") == 123
