"""Parts of over-long samples: as long as planned, nothing cut inside a picture or a turn, nothing lost unseen.

The reference is encoding: of each part, and of the whole sample that it came from.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from visionloom.common.errors import UserError
from visionloom.data.config import OVER_LENGTH, DataConfig
from visionloom.data.encode.encode import EncodedSample, encode
from visionloom.data.encode.tokenizer import END_OF_TEXT, TURN_END, Tokenizer
from visionloom.data.plan.lengths import LENGTHS, Counting, load_lengths, row_of
from visionloom.data.plan.over_length import Cutting, PartsCache, make_parts
from visionloom.data.plan.parts import (
    PART,
    SHRUNK,
    UNFINISHED,
    Part,
    Parts,
    apply_part,
    encode_parts,
)
from visionloom.data.plan.stretches import PackLimits
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import (
    Box,
    Element,
    Image,
    Message,
    Sample,
    Text,
    Think,
    ToolCall,
    Video,
)
from visionloom.data.stream.batch import PackLayout, pack
from visionloom.tests.data.samples import RULES, essay

WORDS = (
    "word",
    "Ünïcode 日本語。",
    "end. ",
    "What?! ",
    "a",
    "\n\n",
    "supercalifragilistic" * 4,
    "tail ",
)
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(
    lambda words: Text(" ".join(words))
)
images = st.tuples(st.integers(1, 8), st.integers(1, 8)).map(
    lambda side: Image("a.png", 40 * side[0], 40 * side[1])
)
videos = st.tuples(st.integers(2, 7), st.integers(1, 5)).map(
    lambda v: Video(
        tuple(f"v{n}.png" for n in range(v[0])), tuple(n / 2 for n in range(v[0])), 64 * v[1], 64
    )
)


@st.composite
def documents(draw: st.DrawFn) -> Sample:
    elements: list[Element] = draw(
        st.lists(st.one_of(texts, texts, images, videos), min_size=1, max_size=8)
    )
    pictures = sum(isinstance(element, Image) for element in elements)
    for _ in range(draw(st.integers(0, 2)) if pictures else 0):
        box = Box(draw(st.integers(0, pictures - 1)), (0, 0, 10, 20), label="it")
        elements.insert(draw(st.integers(0, len(elements))), box)
    return Sample("doc", "doc", content=tuple(elements))


@st.composite
def chats(draw: st.DrawFn) -> Sample:
    messages = [Message("system", (Text("Be brief."),))] if draw(st.booleans()) else []
    pictures = 0
    for _ in range(draw(st.integers(1, 5))):
        shown = draw(st.lists(st.one_of(images, videos), max_size=2))
        pictures += sum(isinstance(element, Image) for element in shown)
        messages.append(Message("user", (*shown, draw(texts))))
        answer: list[Element] = [draw(texts)]
        if pictures and draw(st.booleans()):
            answer.append(Box(draw(st.integers(0, pictures - 1)), (0, 0, 10, 20)))
        if draw(st.booleans()):
            answer.insert(0, Think("Let me see."))
        if draw(st.integers(0, 3)) == 0:
            messages.append(
                Message("assistant", (draw(texts), ToolCall("look", {"where": "there"})))
            )
            messages += [Message("tool", (draw(texts),)) for _ in range(draw(st.integers(1, 2)))]
        messages.append(Message("assistant", tuple(answer)))
    tools = (
        ({"type": "function", "function": {"name": "look"}},)
        if any(m.role == "tool" for m in messages)
        else ()
    )
    return Sample("chat", "chat", tuple(messages), tools=tools)


class Held(Dataset):
    """A dataset in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples, self.name = samples, "held"

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> Sample:
        return self.samples[index]


def parts_of(
    sample: Sample, policy: str, tokens: int, patches: int, tokenizer: Tokenizer
) -> tuple[EncodedSample, list[Part]]:
    """The whole sample, and its parts under a policy."""
    whole = encode(sample, tokenizer, RULES)
    table = np.array([row_of(whole)], LENGTHS)
    limits = PackLimits(tokens, patches, "", policy, "")
    rows = Cutting(Held([sample]), np.array([0]), table, limits, tokenizer, RULES)(0, 1)
    return whole, [Part.of(row) for row in rows]


def pieces(element: Element) -> list[str]:
    """An element as something that can be counted: texts by their characters."""
    return (
        list(element.text) if isinstance(element, Text) else [repr(element).split("max_pixels")[0]]
    )


many = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@many
@given(
    st.one_of(documents(), chats()),
    st.sampled_from(OVER_LENGTH[2:]),
    st.integers(25, 160),
    st.integers(32, 500),
)
def test_views_are_as_long_as_planned_and_fit(
    tokenizer: Tokenizer, sample: Sample, policy: str, tokens: int, patches: int
) -> None:
    whole, parts = parts_of(sample, policy, tokens, patches, tokenizer)
    for excerpt, part in enumerate(parts):
        (encoded,) = encode_parts([sample], [part], tokenizer, RULES, [""])
        assert row_of(encoded) == (part.tokens, part.patches, part.supervised, part.patch_pairs)
        assert part.tokens <= tokens
        assert part.patches <= patches
        assert part.part_number == excerpt
        assert part.sample_supervised == whole.supervised_tokens
        assert encoded.loss_tokens == (None if part.is_whole else whole.supervised_tokens)
        assert encoded.sample_id == sample.id
        assert encoded.position_ids[:, 0].tolist() == [0, 0, 0]
        assert len(encoded.visual_positions) == encoded.patch_count // 4
        assert encoded.position_ids.shape[1] == len(encoded.target_weights) == part.tokens


@many
@given(documents(), st.integers(60, 160))
def test_parts_of_a_document_are_the_document(
    tokenizer: Tokenizer, sample: Sample, tokens: int
) -> None:
    _, parts = parts_of(sample, "split", tokens, 10**6, tokenizer)
    shown = [apply_part(sample, part, RULES) for part in parts]
    found = [
        piece
        for excerpt in shown
        for element in excerpt.content
        if not isinstance(element, Box)
        for piece in pieces(element)
    ]
    whole = [
        piece
        for element in sample.content
        if not isinstance(element, Box)
        for piece in pieces(element)
    ]
    if len(found) == len(whole):
        assert found == whole
    else:  # a picture that alone is too long, with what is bound to it, is left out
        remaining = iter(whole)
        assert all(piece in remaining for piece in found), "parts come in order and repeat nothing"
        bound = any(isinstance(element, Box) for element in sample.content)
        assert bound or any(
            len(encode(Sample("x", "doc", content=(media,)), tokenizer, RULES).input_ids) > tokens
            for media in sample.content
            if isinstance(media, Image | Video)
        )
    for part, excerpt in zip(parts, shown, strict=True):
        (encoded,) = encode_parts([sample], [part], tokenizer, RULES, [""])
        ends = encoded.input_ids == tokenizer.special(END_OF_TEXT)
        assert ends.any() == (not part.flags & UNFINISHED)
        pictures = [element for element in excerpt.content if isinstance(element, Image)]
        for box in (element for element in excerpt.content if isinstance(element, Box)):
            old = next(
                e
                for e in sample.content
                if isinstance(e, Box) and (e.xyxy, e.label) == (box.xyxy, box.label)
            )
            assert pictures[box.image] in sample.images
            assert old is not None


def test_a_long_text_is_cut_at_sentence_ends(tokenizer: Tokenizer) -> None:
    sentences = [f"Sentence number {number} has some words in it. " for number in range(40)]
    sample = Sample(
        "s",
        "doc",
        content=(
            Text("".join(sentences[:25])),
            Image("a.png", 64, 64),
            Text("".join(sentences[25:])),
        ),
    )
    whole, parts = parts_of(sample, "split", 120, 10**6, tokenizer)
    texts = [
        "".join(e.text for e in apply_part(sample, part, RULES).content if isinstance(e, Text))
        for part in parts
    ]
    assert all(text.endswith("it. ") and text.startswith("Sentence") for text in texts)
    assert "".join(texts) == "".join(sentences)
    assert len(whole.input_ids) > 3 * 120
    assert min(part.tokens for part in parts[:-1]) > 120 - 30, (
        "parts are filled up to the last sentence that fits"
    )
    assert [bool(part.flags & UNFINISHED) for part in parts] == [True] * (len(parts) - 1) + [False]


def test_a_box_stays_with_its_picture(tokenizer: Tokenizer) -> None:
    filler = Text("Some words here. " * 6)
    sample = Sample(
        "s",
        "doc",
        content=(
            filler,
            Image("a.png", 64, 64),
            filler,
            Image("b.png", 64, 64),
            Text("See."),
            Box(1, (0, 0, 32, 64)),
            filler,
        ),
    )
    _, parts = parts_of(sample, "split", 90, 10**6, tokenizer)
    shown = [apply_part(sample, part, RULES) for part in parts]
    (with_box,) = [
        excerpt for excerpt in shown if any(isinstance(element, Box) for element in excerpt.content)
    ]
    (box,) = [element for element in with_box.content if isinstance(element, Box)]
    assert with_box.images[box.image].ref == "b.png"


def test_a_chat_is_cut_before_user_turns_only(tokenizer: Tokenizer) -> None:
    turns = [
        message
        for number in range(6)
        for message in (
            Message("user", (Text(f"Question {number}? " * 3),)),
            Message("assistant", (Text("A rather long answer. " * 4),)),
        )
    ]
    sample = Sample("c", "chat", (Message("system", (Text("Be brief."),)), *turns))
    whole, parts = parts_of(sample, "split", 160, 10**6, tokenizer)
    shown = [apply_part(sample, part, RULES) for part in parts]
    assert len(shown) > 1
    assert all(excerpt.messages[0] == sample.messages[0] for excerpt in shown), (
        "each part has the system message"
    )
    assert tuple(message for excerpt in shown for message in excerpt.messages[1:]) == tuple(turns)
    assert sum(part.supervised for part in parts) == whole.supervised_tokens
    pictured = Sample(
        "c", "chat", (Message("user", (Image("a.png", 64, 64), *turns[0].content)), *turns[1:])
    )
    _, parts = parts_of(pictured, "split", 160, 10**6, tokenizer)
    assert parts == [], (
        "all turns are about the picture of the first, and together they are too long: lost, not torn"
    )


def test_shrinking_is_the_largest_that_fits(tokenizer: Tokenizer) -> None:
    sample = Sample(
        "c",
        "chat",
        (
            Message("user", (Image("a.png", 640, 640), Image("b.png", 96, 96), Text("Look"))),
            Message("assistant", (Text("Yes."),)),
        ),
    )
    whole, (part,) = parts_of(sample, "shrink", 200, 10**6, tokenizer)
    assert part.flags & SHRUNK
    (encoded,) = encode_parts([sample], [part], tokenizer, RULES, [""])
    assert encoded.grids[1].tolist() == [1, 6, 6], "small pictures keep their size"
    assert (
        len(encoded.input_ids) - encoded.patch_count // 4
        == len(whole.input_ids) - whole.patch_count // 4
    )
    assert part.tokens > 150
    assert encoded.supervised_tokens == whole.supervised_tokens
    _, parts = parts_of(sample, "shrink", 12, 10**6, tokenizer)
    assert parts == [], "not even the smallest pictures fit"


def test_a_tail_is_cut_from_text_but_not_from_a_video(tokenizer: Tokenizer) -> None:
    video = Video(tuple(f"v{n}.png" for n in range(8)), tuple(n / 2 for n in range(8)), 96, 96)
    text = Text("Words of an answer that goes on and on. " * 3)
    sample = Sample("d", "doc", content=(Text("Film: "), video, text))
    whole = encode(sample, tokenizer, RULES)
    lengths = set()
    for tokens in range(10, len(whole.input_ids), 3):
        _, parts = parts_of(sample, "truncate_tail", tokens, 10**6, tokenizer)
        (part,) = parts
        (encoded,) = encode_parts([sample], [part], tokenizer, RULES, [""])
        assert encoded.patch_count in (0, whole.patch_count)
        assert encoded.input_ids.tolist() == whole.input_ids[: part.tokens].tolist()
        assert END_OF_TEXT not in tokenizer.decode(encoded.input_ids.tolist(), keep_special=True)
        lengths.add(part.tokens)
        if encoded.patch_count and part.tokens < len(whole.input_ids) - 5:
            assert part.tokens >= tokens - 1, "text is cut at the token that fits"
    assert len(lengths) > 5


def test_a_cut_chat_ends_without_an_end_mark_unless_its_turn_is_whole(tokenizer: Tokenizer) -> None:
    messages = (
        Message("user", (Text("Tell me."),)),
        Message("assistant", (Text("One two three four. " * 9),)),
    )
    sample = Sample("c", "chat", messages * 2)
    whole = encode(sample, tokenizer, RULES)
    end = tokenizer.special(TURN_END)
    for tokens in range(20, len(whole.input_ids), 5):
        _, parts = parts_of(sample, "truncate_tail", tokens, 10**6, tokenizer)
        for part in parts:
            (encoded,) = encode_parts([sample], [part], tokenizer, RULES, [""])
            assert encoded.input_ids.tolist() == whole.input_ids[: part.tokens].tolist()
            assert bool(part.flags & UNFINISHED) == (end not in encoded.input_ids[-3:])
            assert part.supervised
    assert parts_of(sample, "truncate_tail", 8, 10**6, tokenizer)[1] == [], (
        "nothing to learn is left"
    )


def test_the_loss_weighs_parts_by_the_whole_sample(tokenizer: Tokenizer) -> None:
    sample = Sample("s", "doc", content=(Text("Sentence after sentence. " * 30),))
    whole, parts = parts_of(sample, "split", 64, 10**6, tokenizer)
    excerpts = encode_parts([sample] * len(parts), parts, tokenizer, RULES, ["x"] * len(parts))
    weights = np.concatenate(
        [
            pack(
                [[excerpt]], PackLayout(64, "sqrt", ("x",), 0), lambda *_: True
            ).loss_weights.numpy()
            for excerpt in excerpts
        ]
    )
    used = weights[weights > 0]
    np.testing.assert_allclose(used, whole.supervised_tokens**-0.5, rtol=1e-6)
    # the first token of a part has nothing to be predicted from
    assert len(used) == whole.supervised_tokens - (len(parts) - 1)


def test_views_of_draws_come_in_order() -> None:
    lengths = np.zeros(10, LENGTHS)
    lengths["tokens"], lengths["supervised"] = np.arange(10) + 1, 1
    special = np.zeros(3, PART)
    special["sample"], special["part_number"], special["tokens"] = [4, 4, 7], [0, 1, 0], [3, 2, 5]
    parts = Parts(lengths, np.array([2, 4, 7]), special)
    rows, draws = parts.of(np.array([7, 2, 4, 0, 9, 4]))
    assert rows["sample"].tolist() == [7, 4, 4, 0, 9, 4, 4]
    assert rows["part_number"].tolist() == [0, 0, 1, 0, 0, 0, 1]
    assert rows["tokens"].tolist() == [5, 3, 2, 1, 10, 3, 2]
    assert draws.tolist() == [0, 2, 2, 3, 4, 5, 5]
    assert len(parts) == 10
    assert parts.dropped == 1
    assert parts.total("tokens") == 55 - (3 + 5 + 8) + 10
    assert parts.lost_tokens == (3 + 5 + 8) - 10
    assert parts.part(4, 1).tokens == 2
    assert parts.part(9, 0).is_whole


UNUSED = PartsCache(Path("unused"), "")
LIMITS = PackLimits(
    100, 50, "phases.long.sequence_length", "error", "data.datasets.web.over_length"
)


def table(tokens: list[int], patches: list[int]) -> np.ndarray:
    rows = np.zeros(len(tokens), LENGTHS)
    rows["tokens"], rows["patches"] = tokens, patches
    return rows


def made(
    tokens: list[int], patches: list[int], tokenizer: Tokenizer, policy: str = "error"
) -> Parts:
    dataset = Held(
        [Sample(f"id{number}", "doc", content=(Text("x"),)) for number in range(len(tokens))]
    )
    dataset.name = "web"
    limits = PackLimits(
        100, 50, "phases.long.sequence_length", policy, "data.datasets.web.over_length"
    )
    return make_parts(dataset, table(tokens, patches), limits, tokenizer, RULES, UNUSED)


def test_over_long_samples_are_named_or_dropped(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError) as error:
        made([100, 101, 300, 10], [0, 0, 0, 50], tokenizer)
    for excerpt in (
        "dataset web",
        "id2",
        "300 tokens",
        "100",
        "2 such samples",
        "phases.long.sequence_length",
        "over_length=drop",
    ):
        assert excerpt in str(error.value)
    parts = made([100, 101, 300, 10, 0], [0, 0, 0, 50, 0], tokenizer, "drop")
    assert parts.of(np.arange(5))[0]["sample"].tolist() == [0, 3], (
        "unreadable samples (no tokens) are no views either"
    )
    assert parts.lost_tokens == 401
    assert parts.dropped == 3


def test_too_many_patches_are_over_length_too(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError,
        match=r"id0 has 51 patches, a pack holds 50 .*data.max_patches_per_token.*over_length=drop",
    ):
        made([10, 10], [51, 0], tokenizer)
    with pytest.raises(UserError, match="none of its 1 samples fits"):
        made([10], [51], tokenizer, "drop")
    with pytest.raises(
        UserError,
        match=r"over_length=keep is unknown: use one of error, drop, split, shrink, truncate_tail",
    ):
        made([10], [1], tokenizer, "keep")


def test_views_are_kept_on_disk(
    config: Callable[..., DataConfig],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = config(texts=[essay(number, 10 * (number % 9)) for number in range(30)])
    dataset = Dataset.open(data.datasets["texts"].path, "texts")
    cache = tmp_path / "cache"
    lengths = load_lengths(dataset, tokenizer, RULES, cache)
    limits = PackLimits(40, 100, "", "split", "")
    parts = make_parts(dataset, lengths, limits, tokenizer, RULES, PartsCache(cache, "table"))
    assert len(parts) > 30
    assert parts.lost_tokens == 0
    monkeypatch.setattr(Cutting, "__call__", lambda *_: pytest.fail("made although they are there"))
    monkeypatch.setattr(
        Counting,
        "__call__",
        lambda *_: pytest.fail("a table does not depend on the length of a pack"),
    )
    again = make_parts(
        dataset,
        load_lengths(dataset, tokenizer, RULES, cache),
        limits,
        tokenizer,
        RULES,
        PartsCache(cache, "table"),
    )
    np.testing.assert_array_equal(again.special, parts.special)
