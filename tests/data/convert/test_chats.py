"""Conversations as people have them: what their keys, marks and turns become. The right values are those of our schema.

References: transformers' `apply_chat_template` on published templates is not at hand; what it must render of thoughts and calls
is written out below from the documented text of the Qwen3-VL templates, and rendered by our own (see test_chat.py).
"""

import base64
from typing import Any

import pytest

from visionloom.data.encode.chat import render
from visionloom.data.shards.sample import (
    Box,
    Element,
    Image,
    Message,
    Point,
    Sample,
    Text,
    Think,
    ToolCall,
)
from visionloom.tests.data.conversion import Run
from visionloom.tests.data.samples import RULES, png

ASK = {"role": "user", "content": "2+2?"}
CALL = '{"name": "age", "arguments": {"born": 1990}}'
AGE = ToolCall("age", {"born": 1990})


def turns(*contents: Any) -> list[dict[str, Any]]:
    """Turns of user and assistant in turn; a mapping says a whole turn."""
    roles = ("user", "assistant")
    return [
        one if isinstance(one, dict) else {"role": roles[n % 2], "content": one}
        for n, one in enumerate(contents)
    ]


def one(run: Run, record: dict[str, Any], kind: str = "sharegpt") -> Sample:
    """The sample of one record."""
    (sample,) = run(kind, run.lines(record))
    return sample


def reason(run: Run, record: dict[str, Any], kind: str = "sharegpt") -> str:
    """Why one record is left out, beside one that is not."""
    good = {"messages": turns("hi", "hello")} if kind == "sharegpt" else {"text": "good"}
    assert len(run(kind, run.lines(good, record))) == 1
    (left,) = run.skipped
    assert left[0] == "records.jsonl:1"
    return left[1]


# ---- keys that change what is trained


@pytest.mark.parametrize(
    ("marks", "loss"),
    [
        ({"loss": False}, 0.0),
        ({"loss": True}, None),
        ({"weight": 0}, 0.0),
        ({"weight": 1}, None),
        ({"weight": 0.25}, 0.25),
        ({"train": False}, 0.0),
        ({"trainable": False}, 0.0),
        ({"loss_scale": 0.5}, 0.5),
        ({"loss": False, "weight": 0}, 0.0),
        ({"loss": None}, None),
    ],
)
def test_a_turn_is_learned_as_its_marks_say(
    marks: dict[str, Any], loss: float | None, run: Run
) -> None:
    sample = one(
        run,
        {
            "messages": turns(
                "2+2?", {"role": "assistant", "content": "five", **marks}, "again", "four"
            )
        },
    )
    assert [message.loss for message in sample.messages] == [None, loss, None, None]
    assert not [name for name in run.counts if name.startswith("not read")]


def test_a_user_may_be_learned_and_a_part_may_have_a_weight(run: Run) -> None:
    parts = [{"type": "text", "text": "no "}, {"type": "text", "text": "yes", "loss": 0.5}]
    sample = one(
        run,
        {
            "messages": [{**ASK, "train": True}, {"role": "assistant", "content": parts}],
            "weight": 2,
        },
    )
    assert (sample.weight, sample.messages[0].loss) == (2.0, 1.0)
    assert sample.messages[1].content == (Text("no "), Text("yes", loss=0.5))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"loss": "no"}, "unknown loss mark"),
        ({"loss": False, "weight": 1}, "unknown loss mark"),
        ({"weight": -1}, "unknown loss mark"),
        ({"train_detail": [{"begin": 0, "end": 3, "train": False}]}, "unknown loss mark"),
        ({"loss_mask": [0, 1]}, "unknown loss mark"),
        ({"masked": True}, "unknown loss mark"),
        ({"do_train": 0}, "unknown loss mark"),
        ({"audio": {"id": "x"}}, "audio"),
        ({"rejected": "five"}, "preference data"),
    ],
)
def test_unclear_marks_of_a_turn_leave_the_record_out(
    changed: dict[str, Any], why: str, run: Run
) -> None:
    assert (
        reason(
            run, {"messages": turns("2+2?", {"role": "assistant", "content": "four", **changed})}
        )
        == why
    )


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"rejected": "five"}, "preference data"),
        ({"rejected_response": "five"}, "preference data"),
        ({"chosen": [1], "messages": turns("a", "b")}, "preference data"),
        ({"kto_tag": True}, "preference data"),
        ({"label": False}, "preference data"),
        ({"negative_messages": [ASK]}, "preference data"),
        ({"train": False}, "unknown loss mark"),
        ({"sample_weight": 0.5}, "unknown loss mark"),
        ({"audios": ["a.wav"]}, "audio"),
        ({"audio_path": "a.wav"}, "audio"),
        ({"loss": False}, "unknown loss mark"),
        ({"mask_history": True}, "unknown loss mark"),
        (
            {
                "system": "Be brief.",
                "messages": [{"role": "system", "content": "Be long."}, *turns("a", "b")],
            },
            "two system turns",
        ),
        ({"image": "a.png", "images": ["b.png"]}, "keys that say different things"),
    ],
)
def test_a_record_that_says_more_than_can_be_trained_is_left_out(
    changed: dict[str, Any], why: str, run: Run
) -> None:
    assert reason(run, {"messages": turns("2+2?", "four"), **changed}) == why


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_key_of_its_own(key: str, run: Run) -> None:
    sample = one(
        run, {"messages": [ASK, {"role": "assistant", "content": "4", key: "two and two\n"}]}
    )
    assert sample.messages[1].content == (Think("two and two"), Text("4"))
    assert render(sample, RULES).text.endswith(
        "<|im_start|>assistant\n<think>\ntwo and two\n</think>\n\n4<|im_end|>\n"
    )


def test_reasoning_twice_is_one_thought_if_it_is_the_same(run: Run) -> None:
    same = {
        "role": "assistant",
        "content": "<think>\nsum\n</think>\n\n4",
        "reasoning": "sum",
        "reasoning_content": "sum",
    }
    assert one(run, {"messages": [ASK, same]}).messages[1].content == (Think("sum"), Text("4"))


def test_two_different_thoughts_are_left_out(run: Run) -> None:
    other = {"role": "assistant", "content": "<think>a</think>4", "reasoning": "b"}
    assert reason(run, {"messages": [ASK, other]}) == "two thoughts in an answer"


def test_keys_that_are_not_read_are_counted_with_their_first_record(run: Run) -> None:
    run.put("a.png", png(64, 64))
    part = {
        "type": "image",
        "image": "a.png",
        "detail": "high",
        "max_pixels": 4096,
        "min_pixels": 1024,
    }
    calls = [{"type": "function", "index": 0, "function": {"name": "f", "arguments": {}}}]
    record = {
        "messages": [
            {
                "role": "user",
                "content": [part, {"type": "text", "text": "what?", "cache_control": 1}],
                "name": "me",
            },
            {"role": "assistant", "content": "red", "tool_calls": calls},
        ],
        "score": 3,
        "source": "mine",
        "objects": {"ref": ["a"], "bbox": [[0, 0, 1, 1]]},
        "labels": ["cat"],
    }
    _, second = run("sharegpt", run.lines({"messages": turns("a", "b")}, record))
    assert second.images == (Image("img0.png", 64, 64, 1024, 4096),) and second.meta == {
        "source": "mine"
    }
    found = {
        name.removeprefix("not read: "): run.tally.first[name]
        for name in run.counts
        if name.startswith("not read")
    }
    keys = (
        "picture key detail",
        "text key cache_control",
        "turn key name",
        "call key index",
        "record key score",
    )
    assert found == dict.fromkeys(
        (*keys, "record key labels", "objects key ref", "objects key bbox"), "records.jsonl:1"
    )


def test_some_boxes_left_over_are_a_fault(run: Run) -> None:
    run.put("a.png", png(64, 64))
    record = {
        "messages": turns("<image>where?", "<bbox>"),
        "images": ["a.png"],
        "objects": {"bbox": [[0, 0, 9, 9], [1, 1, 2, 2]]},
    }
    assert reason(run, record) == "fewer placeholders than objects"


def test_the_record_s_system_text_comes_first(run: Run) -> None:
    for key in ("system", "system_prompt"):
        run.folder = run.source.parent / key
        sample = one(run, {"messages": turns("hi", "aye"), key: "Speak like a pirate."})
        assert sample.messages[0] == Message("system", (Text("Speak like a pirate."),))


# ---- marks written in texts


@pytest.mark.parametrize(
    ("answer", "content"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", (AGE,)),
        (f"I look.\n<tool_call>\n{CALL}\n</tool_call>", (Text("I look."), AGE)),
        (f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", (AGE, AGE)),
        (f"<think>\nhm\n</think>\n<tool_call>{CALL}</tool_call>", (Think("hm"), AGE)),
        ("two and two\n</think>\n\n4", (Think("two and two"), Text("4"))),
        ("<think>\n\n</think>\n\n4", (Think(""), Text("4"))),
        ("<think>x</think>4", (Think("x"), Text("4"))),
        ("\n<think>\nx\ny\n</think>\n\n\n4", (Think("x\ny"), Text("4"))),
        ("4<|im_end|>", (Text("4"),)),
        ("4<|im_end|>\n", (Text("4"),)),
        ("4<|endoftext|>", (Text("4"),)),
        ("a < b and <video> tags", (Text("a < b and <video> tags"),)),
    ],
)
def test_marks_of_an_answer_become_structure(
    answer: str, content: tuple[Element, ...], run: Run
) -> None:
    assert one(run, {"messages": turns("2+2?", answer)}).messages[1].content == content


def test_what_a_source_spells_its_own_way_is_written_as_the_template_does(run: Run) -> None:
    """By the Instruct template a call follows a text after one newline; by the Thinking one a thought has one at each edge."""
    answer = (
        '<think>x</think>I look.\n\n<tool_call>{"name":"age","arguments":{"born":1990}}</tool_call>'
    )
    written = render(one(run, {"messages": turns("age?", answer)}), RULES).text
    assert written.endswith(
        f"assistant\n<think>\nx\n</think>\n\nI look.\n\n<tool_call>\n{CALL}\n</tool_call><|im_end|>\n"
    )


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("Well. <think>two</think> 4", "thought in the middle of an answer"),
        ("<think>two", "thought in the middle of an answer"),
        ("<think>a</think>b<think>c</think>d", "thought in the middle of an answer"),
        (f"<tool_call>{CALL}</tool_call> and more", "text behind a tool call"),
        ("<tool_call>not json</tool_call>", "broken tool call"),
        ('<tool_call>{"name": 7}</tool_call>', "broken tool call"),
        (f"<tool_call>{CALL}", "<tool_call> in a text"),
        ("<tool_response>36</tool_response>", "<tool_response> in a text"),
        ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|> in a text"),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", "<|box_start|> in a text"),
        ("<|object_ref_start|>cat<|object_ref_end|>", "<|object_ref_start|> in a text"),
        ("a<|im_end|>\n<|im_start|>user\nb", "<|im_end|> in a text"),
    ],
)
def test_marks_that_are_no_structure_leave_the_record_out(answer: str, why: str, run: Run) -> None:
    assert reason(run, {"messages": turns("2+2?", answer)}) == why


def test_a_user_s_marks_stay_words_and_are_counted(run: Run) -> None:
    trap = "say <|im_end|> and </think> and <tool_call>{}</tool_call><|image_pad|>"
    assert one(run, {"messages": turns(trap, "no")}).messages[0].content == (Text(trap),)
    assert run.counts["marks kept as words: <|im_end|> of a user"] == 1


def test_results_in_text_become_messages_of_the_tool(run: Run) -> None:
    answers = "<tool_response>\n36\n</tool_response>\n<tool_response>\n34\n</tool_response>"
    call = f"<tool_call>{CALL}</tool_call>"
    for result in ({"role": "user", "content": answers}, {"role": "tool", "content": answers}):
        run.folder = run.source.parent / result["role"]
        sample = one(
            run,
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "content": call},
                    result,
                    {"role": "gpt", "content": "70"},
                ]
            },
        )
        assert sample.messages[2:4] == (
            Message("tool", (Text("36"),)),
            Message("tool", (Text("34"),)),
        )
        assert render(sample, RULES).text.count("<|im_start|>user") == 2


@pytest.mark.parametrize(
    "text",
    ["<video> and <image> are tags", "Use <image>", "what is <image> in SVG?", "<image>, please"],
)
def test_a_chat_without_media_keeps_its_words(text: str, run: Run) -> None:
    assert one(run, {"messages": turns(text, text)}).messages == (
        Message("user", (Text(text),)),
        Message("assistant", (Text(text),)),
    )


@pytest.mark.parametrize(
    "text", ["<image>\nwhat?", "what?\n<image>", "<image>what?", "<image>", "one\n<image>\ntwo"]
)
def test_a_placeholder_that_stands_by_itself_misses_its_picture(text: str, run: Run) -> None:
    assert reason(run, {"messages": turns(text, "red")}) == "more placeholders than media"


def test_a_rendered_prompt_s_vision_block_is_the_picture(run: Run) -> None:
    run.put("a.png", png(8, 8))
    text = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>what?"
    sample = one(run, {"messages": turns(text, "red"), "images": ["a.png"]})
    assert sample.messages[0].content == (Image("img0.png", 8, 8), Text("what?"))


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nhi<|im_end|>",
        "a<|endoftext|>b",
        "<think>x</think> y",
        "<tool_call>{}</tool_call>",
    ],
)
def test_a_document_with_marks_inside_is_left_out(text: str, run: Run) -> None:
    assert reason(run, {"text": text}, kind="jsonl").endswith("in a text")


def test_a_document_s_end_mark_is_the_template_s(run: Run) -> None:
    assert one(run, {"text": "whole<|endoftext|>"}, kind="jsonl").content == (Text("whole"),)


def test_own_schema_has_elements_for_marks(run: Run) -> None:
    written = {"id": "x", "kind": "chat", "messages": turns("2+2?", "<think>a</think>4")}
    assert reason(run, written, kind="jsonl") == "<think> in a text"


# ---- turns that are one turn


def test_calls_belong_to_what_was_said_before_them(run: Run) -> None:
    call = {"role": "tool_call", "content": CALL}
    said = [
        ASK,
        {"role": "assistant", "content": "I look."},
        call,
        call,
        {"role": "tool_response", "content": "36"},
        *turns("", "36")[1:],
    ]
    sample = one(run, {"messages": said})
    assert [message.role for message in sample.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert sample.messages[1].content == (Text("I look."), AGE, AGE)
    text = render(sample, RULES).text
    block = f"<tool_call>\n{CALL}\n</tool_call>"
    assert (
        f"<|im_start|>assistant\nI look.\n{block}\n{block}<|im_end|>\n<|im_start|>user\n<tool_response>\n36\n"
        in text
    )


def test_joined_turns_keep_their_own_weights(run: Run) -> None:
    said = [
        ASK,
        {"role": "assistant", "content": "I look.", "loss": False},
        {"role": "tool_call", "content": CALL},
    ]
    (_, message) = one(run, {"messages": said}).messages
    assert (
        message.content == (Text("I look.", loss=0.0), ToolCall("age", {"born": 1990}, loss=1.0))
        and message.loss is None
    )


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "function_call", "content": f"[{CALL}, {CALL}]"},
        {"role": "Tool_Call", "content": [{"name": "age", "arguments": {"born": 1990}}] * 2},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "age", "arguments": '{"born": 1990}'}}] * 2,
        },
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": "age", "parameters": {"born": 1990}}] * 2,
        },
    ],
)
def test_a_list_of_calls_is_one_turn(turn: dict[str, Any], run: Run) -> None:
    assert one(run, {"messages": [ASK, turn]}).messages[1].content == (AGE, AGE)


def test_a_thought_before_a_call_in_a_turn_of_its_own(run: Run) -> None:
    turn = {"role": "function_call", "content": f"<think>\nhm {{}}\n</think>\n\n{CALL}"}
    assert one(run, {"messages": [ASK, turn]}).messages[1].content == (Think("hm {}"), AGE)


# ---- null means absent


def test_nulls_are_no_keys_at_any_depth(run: Run) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "string", "enum": None}, "b": None},
    }
    tool = {
        "type": "function",
        "function": {"name": "age", "parameters": parameters, "strict": None},
    }
    call = {"function": {"name": "age", "arguments": {"born": 1990, "city": None}}, "id": None}
    record = {
        "messages": [
            {**ASK, "tool_calls": None, "from": None},
            {"role": "assistant", "content": None, "tool_calls": [call], "loss": None},
        ],
        "tools": [tool],
        "images": None,
        "rejected": None,
        "score": None,
    }
    sample = one(run, record)
    assert sample.messages[1].content == (AGE,)
    wanted = {"type": "object", "properties": {"a": {"type": "string"}}}
    assert sample.tools == (
        {"type": "function", "function": {"name": "age", "parameters": wanted}},
    )
    assert run.counts == {"records": 1, "samples": 1}


# ---- forms of media


@pytest.mark.parametrize(
    "form",
    [
        "data:image;base64,",
        "data:image/png;base64,",
        "data:image/png;charset=utf-8;base64,",
        "",
        "wrapped",
        "key",
    ],
)
def test_inline_pictures(form: str, run: Run) -> None:
    data = base64.b64encode(png(40, 40, 3)).decode()
    ref: Any = {
        "wrapped": base64.encodebytes(png(40, 40, 3)).decode(),
        "key": {"base64": data},
    }.get(form, form + data)
    part = {"type": "image", "image": ref} if form != "key" else {"type": "image", **ref}
    one(
        run,
        {
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": "?"}]},
                *turns("", "red")[1:],
            ]
        },
    )
    assert run.dataset.member(0, "img0.png") == png(40, 40, 3)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "input_image", "image_url": "a.png"},
        {"image": "a.png"},
        {"type": "image", "image": {"path": "a.png"}},
    ],
)
def test_a_typed_part_names_its_picture_in_many_ways(part: dict[str, Any], run: Run) -> None:
    run.put("a.png", png(8, 8))
    sample = one(
        run,
        {"messages": [{"role": "user", "content": [part, {"text": "?"}]}, *turns("", "red")[1:]]},
    )
    assert sample.messages[0].content == (Image("img0.png", 8, 8), Text("?"))


def test_media_given_twice_are_shown_once(run: Run) -> None:
    run.put("a.png", png(8, 8, 1))
    run.put("b.png", png(8, 8, 2))
    content = [
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": " and "},
        {"type": "image", "image": "a.png"},
    ]
    record = {
        "messages": [{"role": "user", "content": content}, *turns("", "red")[1:]],
        "images": ["a.png", "b.png"],
    }
    assert one(run, record).messages[0].content == (
        Image("img0.png", 8, 8),
        Text(" and "),
        Image("img1.png", 8, 8),
    )
    assert run.dataset.member(0, "img0.png") == png(8, 8, 2)


def test_other_media_beside_typed_parts_are_a_fault(run: Run) -> None:
    run.put("a.png", png(8, 8, 1))
    run.put("b.png", png(8, 8, 2))
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}]},
            *turns("", "red")[1:],
        ],
        "images": ["b.png"],
    }
    assert reason(run, record) == "media beside typed parts"


def test_pictures_of_a_turn_belong_to_it(run: Run) -> None:
    run.put("a.png", png(8, 8, 1))
    run.put("b.png", png(8, 8, 2))
    said = [
        {**ASK, "images": ["a.png"]},
        *turns("", "4")[1:],
        {"role": "user", "content": "or <image>?", "image": "b.png"},
        *turns("", "5")[1:],
    ]
    sample = one(run, {"messages": said})
    assert sample.messages[0].content == (Image("img0.png", 8, 8), Text("2+2?"))
    assert sample.messages[2].content == (Text("or "), Image("img1.png", 8, 8), Text("?"))


def test_boxes_count_pictures_in_reading_order(run: Run) -> None:
    run.put("a.png", png(50, 100))
    objects = {"bbox": [[10, 20, 60, 40], [5, 5]], "image_id": [0, 0]}
    sample = one(
        run,
        {
            "messages": turns("<image>where?", "<bbox>, <bbox>"),
            "images": ["a.png"],
            "objects": objects,
        },
    )
    assert sample.messages[1].content == (Box(0, (10, 20, 60, 40)), Text(", "), Point(0, (5, 5)))


# ---- what cannot be learned from


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (turns("2+2?", ""), "empty answer"),
        (turns("2+2?", " \n"), "empty answer"),
        (turns("2+2?", "<think>x</think>"), "empty answer"),
        (turns("a", "", "b", "c"), "empty answer"),
        (
            turns("2+2?", {"role": "assistant", "content": "four", "loss": False}),
            "nothing supervised",
        ),
        (turns("2+2?"), "no answer"),
    ],
)
def test_a_chat_that_teaches_nothing_is_left_out(
    messages: list[dict[str, Any]], why: str, run: Run
) -> None:
    assert reason(run, {"messages": messages}) == why


def test_a_picture_that_training_refuses_is_left_out(run: Run) -> None:
    run.put("a.png", png(2, 402))
    assert (
        reason(run, {"messages": turns("<image>what?", "a line"), "images": ["a.png"]})
        == "picture too narrow"
    )


def test_the_task_of_a_record_is_the_sample_s(run: Run) -> None:
    first, second = run(
        "sharegpt",
        run.lines({"messages": turns("a", "b"), "task": "own"}, {"messages": turns("a", "b")}),
        task="all",
    )
    assert (first.task, second.task) == ("own", "all")
