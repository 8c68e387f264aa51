"""Frames of a video by the phase that reads it. Reference: transformers' video processor, by the rule `hf`, on the same settings."""

from dataclasses import replace

import pytest

from visionloom.common.errors import UserError
from visionloom.data.config import MediaConfig, VideoSampling
from visionloom.data.encode.encode import encode
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.shards.sample import Message, Sample, Text
from visionloom.launch.configure import compose
from visionloom.tests.data.encode.test_video import described
from visionloom.train.config import RunConfig
from visionloom.train.stream_options import stream_options


def run(*words: str) -> RunConfig:
    config = compose(["+recipe=demo", *words], 2)
    assert config is not None
    return config


def test_each_phase_has_its_own() -> None:
    config = run(
        "phases.ultra.video.fps=4",
        "phases.ultra.video.max_frames=2048",
        "phases.long.video.max_pixels=5000",
    )
    base = config.data.media
    media = {name: stream_options(config, name).data.media for name in config.phases}
    assert media["multimodal"] == base
    assert media["ultra"] == replace(base, video_fps=4.0, video_max_frames=2048)
    assert media["long"] == replace(base, video_max_pixels=5000)


def test_a_bound_below_that_of_the_data_is_named() -> None:
    with pytest.raises(
        UserError, match=r"phases\.ultra\.video: data\.media\.video_min_frames=4 is above"
    ):
        run("phases.ultra.video.max_frames=2")


@pytest.mark.parametrize(("sampling", "frames"), [
    (VideoSampling(), 8), (VideoSampling(fps=1.0), 4), (VideoSampling(fps=5.0), 20), (VideoSampling(fps=5.0, max_frames=12), 12),
])  # fmt: skip
def test_frames_and_timestamps_follow(
    sampling: VideoSampling, frames: int, tokenizer: Tokenizer
) -> None:
    """Four seconds of film: as many frames as the phase takes, two to a patch, each pair after its time as text."""
    clip = described(100)
    chat = (Message("user", (clip, Text("?"))), Message("assistant", (Text("Yes."),)))
    rules = sampling.applied_to(MediaConfig(video_min_pixels=1024, video_max_pixels=2**24))
    encoded = encode(Sample("s", "chat", chat), tokenizer, rules, "a")
    text = tokenizer.decode(encoded.input_ids.tolist())
    assert text.count(" seconds>") == frames // 2
    assert [grid[0] for grid in encoded.grids] == [frames // 2]
