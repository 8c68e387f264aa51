"""Answers of many prompts at once. References: transformers' generate, one prompt at a time; the trainer's loss; one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from visionloom.data.encode.encode import extend
from visionloom.data.stream.batch import PackLayout, pack
from visionloom.parallel.topology import Topology
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.generation.models import (
    SMALL,
    STOP,
    WIDE,
    Layout,
    answer,
    build,
    prompts,
    transformers_answer,
    transformers_model,
)
from visionloom.train.generation.generator import Answer, Generator, evaluating
from visionloom.train.generation.sampling import Sampling

MOST = 12
GREEDY = Sampling(MOST, STOP, temperature=0)
DRAWN = Sampling(MOST, STOP, temperature=0.9, top_k=40, top_p=0.97, answers=3, seed=5)
LAYOUTS = {
    "tensor2": Layout(2, {"tensor": 2}),
    "expert2": Layout(2, {"expert": 2}, experts=4),
    "pipeline2 virtual2": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    "context2": Layout(2, {"context": 2}),
    "pipeline2 context2": Layout(4, {"pipeline": 2, "context": 2}),
    "tensor2 pipeline2": Layout(4, {"tensor": 2, "pipeline": 2}),
    "tensor2 expert2": Layout(4, {"tensor": 2, "expert": 2, "sequence": True}, experts=4),
}
FAST = ("tensor2", "expert2")
Answers = dict[str, list[Answer]]


def tokens_of(answers: Answers) -> dict[str, list[list[int]]]:
    return {name: [one.token_ids for one in some] for name, some in answers.items()}


@pytest.mark.parametrize("experts", [0, 4])
def test_greedy_answers_are_those_of_transformers(experts: int, topology: Topology) -> None:
    """With places that are taken again, and with all prompts at once."""
    layout = Layout(experts=experts)
    ours, together = (answer(layout, GREEDY, budget) for budget in (SMALL, WIDE))
    theirs = transformers_model(build(layout)[1][0])
    ends = set()
    for prompt in prompts():
        found = transformers_answer(
            theirs, prompt, MOST, eos_token_id=list(STOP), pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        expected = found.sequences[0, len(prompt.input_ids) :].tolist()
        for (mine,) in (ours[prompt.sample_id], together[prompt.sample_id]):
            assert mine.token_ids == expected
            scores = torch.cat(found.logits).log_softmax(1)
            likely = scores.gather(1, torch.tensor(expected)[:, None])[:, 0]
            np.testing.assert_allclose(mine.log_probabilities, likely, rtol=0, atol=1e-5)
            assert mine.is_stopped == (expected[-1] in STOP)
            assert not any(mine.sampling_log_probabilities)
            ends.add(mine.is_stopped)
    assert ends == {True, False}


def test_log_probabilities_are_the_losses_of_training(topology: Topology) -> None:
    _, (model,) = build(Layout())
    for prompt, some in zip(prompts(), answer(Layout(), DRAWN, SMALL).values(), strict=True):
        for one in some:
            whole = extend(prompt, one.token_ids)
            whole.target_weights[len(prompt.input_ids) :] = 1
            batch = pack([[whole]], PackLayout(len(whole.input_ids), "token", ("test",), 0))
            with evaluating([model]):
                _, losses = model(model.prepare(batch))
            np.testing.assert_allclose(one.log_probabilities, -losses[0], rtol=0, atol=1e-5)


def test_answers_do_not_depend_on_their_company(topology: Topology) -> None:
    """Other batches, another order, more answers to each: the same draws; another seed: others."""
    expected = tokens_of(answer(Layout(), DRAWN, WIDE))
    assert tokens_of(answer(Layout(), DRAWN, SMALL)) == expected
    assert len({tuple(one) for some in expected.values() for one in some}) > 20

    topology, parts = build(Layout())
    generator = Generator(parts, topology, 0, SMALL)
    backwards = prompts()[::-1]
    found = generator.generate(backwards, replace(DRAWN, answers=4))
    for prompt, some in zip(backwards, found, strict=True):
        assert [one.token_ids for one in some[:3]] == expected[prompt.sample_id]
    assert tokens_of(answer(Layout(), replace(DRAWN, seed=6), WIDE)) != expected
    assert generator.generate([], DRAWN) == []
    assert parts[0].topology is topology and parts[0].training


def test_an_answer_ends_with_its_first_stop_token_or_at_the_limit(topology: Topology) -> None:
    free = answer(Layout(), Sampling(MOST, (), temperature=0), WIDE)
    for name, (one,) in answer(Layout(), GREEDY, WIDE).items():
        (whole,) = free[name]
        stops = [place for place, token in enumerate(whole.token_ids) if token in STOP]
        length = stops[0] + 1 if stops else MOST
        assert one.token_ids == whole.token_ids[:length]
        assert len(whole.token_ids) == MOST and not whole.is_stopped
    single = answer(Layout(), Sampling(1, STOP, temperature=0), SMALL)
    assert {name: some[0].token_ids for name, some in single.items()} == {
        name: some[0].token_ids[:1] for name, some in free.items()
    }


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.long) for name in LAYOUTS],
)
def test_a_layout_changes_no_draw(name: str, pool: RankPool) -> None:
    """Reference: one process. Data ranks have prompts of different lengths, and one may have none left."""
    layout = LAYOUTS[name]
    (expected,) = pool.run(1, answer, Layout(experts=layout.experts), DRAWN, WIDE)
    found: Answers = {}
    for answers in pool.run(layout.ranks, answer, layout, DRAWN, SMALL):
        for key, some in answers.items():
            assert tokens_of({key: found.setdefault(key, some)}) == tokens_of({key: some})
    assert tokens_of(found) == tokens_of(expected)
    for key, some in found.items():
        for one, other in zip(some, expected[key], strict=True):
            np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=1e-5)
