"""The best layouts are found with few traces. Reference: a stated time and memory of each layout in place of a trace."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from visionloom.common.errors import UserError
from visionloom.forecast.machine import machine
from visionloom.forecast.results import PhaseForecast, RankForecast, Span
from visionloom.forecast.schedule import Pipeline
from visionloom.forecast.search import search as searches
from visionloom.forecast.search.bounds import RestBounds
from visionloom.forecast.search.estimates import Estimates
from visionloom.forecast.search.search import BATCH, CONFIRMED, SearchGoal, SearchResult, search
from visionloom.forecast.search.stages import ChunkSeconds, PassSeconds
from visionloom.forecast.timeline import Timeline, play
from visionloom.model.flops import StepWork
from visionloom.parallel.config import EXCHANGES, ParallelConfig
from visionloom.parallel.pipeline import layers_per_chunk
from visionloom.tests.model.test_sizes import published
from visionloom.train.config import RunConfig, RunSection
from visionloom.train.phase.config import PhaseConfig

GIB = 1 << 30
WORLD = 16
TOKENS = 32 * 8192


GPU = machine("h100")
ROOM = GPU.usable_bytes / GIB


def run_of(model: str = "qwen3vl_8b", global_batch: int = 32) -> RunConfig:
    phase = PhaseConfig(steps=10, global_batch=global_batch)
    return RunConfig(RunSection(name="x"), published(model), phases={"p": phase})


@dataclass
class Stated:
    """Forecasts that say what is stated of a layout, the same of mean and of fullest packs, and note the runs."""

    seconds: Callable[[ParallelConfig], float]
    gib: Callable[[ParallelConfig], float]
    more_gib: float = 0.0
    """Of the fullest packs."""
    seen: list[RunConfig] = field(default_factory=list)
    full_seen: list[RunConfig] = field(default_factory=list)
    timeline: Callable[[ParallelConfig], tuple[Span, ...]] = lambda _: ()

    def ranking(self, runs: Sequence[RunConfig]) -> list[PhaseForecast]:
        self.seen += runs
        return [self.forecast(run.parallel) for run in runs]

    def full(self, run: RunConfig) -> PhaseForecast:
        self.full_seen.append(run)
        return self.forecast(run.parallel, self.more_gib)

    def forecast(self, layout: ParallelConfig, more: float = 0.0) -> PhaseForecast:
        step, peak = self.seconds(layout), round((self.gib(layout) + more) * GIB)
        rank = RankForecast(0, 0, WORLD, "layers 0-35", {}, peak, (), 0, 0, 0, 0, 0, (), ())
        bubble = (layout.pipeline - 1) / (31 + layout.pipeline)
        facts = ("p", "words", 8192, "packs", 10, step, TOKENS, TOKENS / step, 0.4, bubble)
        return PhaseForecast(*facts, 0.1 * layout.tensor, {}, (rank,), self.timeline(layout), ())


def searched(
    seconds: Callable[[ParallelConfig], float],
    gib: Callable[[ParallelConfig], float],
    tries: int = 20,
) -> tuple[SearchResult, list[RunConfig]]:
    answers = Stated(seconds, gib)
    return search(SearchGoal(run_of(), "p", WORLD, GPU, tries), answers), answers.seen


def layouts(runs: list[RunConfig]) -> list[ParallelConfig]:
    return [run.parallel for run in runs]


def test_the_fastest_that_fits_comes_first() -> None:
    result, seen = searched(
        pace,
        lambda layout: 90 if layout.pipeline == 1 else 60,
    )
    best = result.tried[0]
    assert best.fits and best.config.parallel.pipeline > 1
    fitting = [row for row in result.tried if row.fits]
    speeds = [row.forecast.tokens_per_second for row in fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert [row.fits for row in result.tried] == [True] * len(fitting) + [False] * (
        20 - len(fitting)
    )
    assert len(seen) == 20
    for run in seen:
        assert run.all_problems(WORLD) == []
    shapes = [repr(layout) for layout in layouts(seen)]
    assert len(set(shapes)) == 20, "no layout is traced twice"


def test_the_first_to_be_tried_differ() -> None:
    _, seen = searched(lambda _: 1.0, lambda _: 50)
    shapes = {(one.tensor, one.pipeline, one.context) for one in layouts(seen)}
    assert len(shapes) >= 8


def test_reasons_name_what_grew() -> None:
    result, _ = searched(lambda one: 5 + one.tensor, lambda one: 100 if one.pipeline > 1 else 60)
    reasons = {row.config.parallel.tensor: result.reason(row) for row in result.tried if row.fits}
    assert result.reason(result.tried[0]) == "the fastest that fits, 17.0 GiB to spare"
    best = result.tried[0].config.parallel.tensor
    slow = max(reasons)
    assert slow > best
    slower = (5 + slow) / (5 + best) - 1
    assert reasons[slow].startswith(f"{slower:.0%} slower: it computes ")
    (large, *_) = [row for row in result.tried if not row.fits]
    # What the fullest packs take on top is estimated.
    needs = large.peak_bytes / GIB
    assert 100 <= needs < 115
    assert result.reason(large) == f"does not fit: needs {needs:.1f} of 77.0 GiB (layers 0-35)"


def test_recomputation_is_raised_until_it_fits() -> None:
    memory = {"none": 200, "norms_and_activations": 160, "mlp": 120}
    memory |= {"all_but_attention": 100, "full": 60}
    result, seen = searched(lambda _: 1.0, lambda one: memory[one.recompute])
    assert result.tried[0].config.parallel.recompute == "full"
    first = [one for one in layouts(seen) if one.recompute != "full"]
    # The first traces say how wrong the estimates of activations are: the others begin with what fits.
    assert 1 <= len(first) <= 3 * BATCH
    assert not any(one.offload_activations for one in layouts(seen))


def test_offloading_is_the_last_cure() -> None:
    result, seen = searched(lambda _: 1.0, lambda one: 70 if one.offload_activations else 95)
    assert result.tried[0].config.parallel.offload_activations
    offloaded = [one.offload_activations for one in layouts(seen)]
    assert offloaded == [False] * 20 + [True] * 5


def pace(layout: ParallelConfig) -> float:
    return 10 + 3 * abs(layout.tensor - 4) + layout.pipeline + layout.context / 10


def test_the_best_pipelines_are_dealt_anew_by_their_own_times() -> None:
    """A tower that takes as long as twelve layers; only steps of interleaved stages are short."""

    def played(layout: ParallelConfig) -> Timeline:
        pipeline = Pipeline(layout.pipeline, layout.chunks, 32)
        tower = PassSeconds(12e-3, 24e-3)
        seconds = ChunkSeconds(pipeline, PassSeconds(1e-3, 2e-3), tower, PassSeconds(0.0, 0.0))
        return play(pipeline, seconds.stages(pipeline, layers_per_chunk(layout, 36)))

    def step(layout: ParallelConfig) -> float:
        return max(played(layout).ends) if layout.chunks > 1 else 10.0

    answers = Stated(step, lambda _: 60, timeline=lambda layout: played(layout).spans)
    result = search(SearchGoal(run_of(), "p", WORLD, GPU), answers)
    best = result.tried[0].config.parallel
    assert best.chunks > 1 and best.pipeline_layout is not None
    even = replace(best, pipeline_layout=None)
    assert step(best) < 0.9 * step(even)
    assert 20 < len(answers.seen) <= 20 + CONFIRMED


def test_a_batch_does_not_change_what_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reference: one layout after another. Memory as estimated teaches nothing, so that all are the same."""
    of = estimates(world_size=WORLD, global_batch=32)
    rest = RestBounds.of(of.config, "p", WORLD)

    def gib(layout: ParallelConfig) -> float:
        return (rest.of_fullest_rank(layout) + of.activation_bytes(layout)) / GIB

    result, _ = searched(pace, gib)
    monkeypatch.setattr(searches, "BATCH", 1)
    one_by_one, _ = searched(pace, gib)
    assert BATCH > 1 and one_by_one.tried[0].fits
    assert [row.yaml for row in result.tried] == [row.yaml for row in one_by_one.tried]


def test_a_batch_finds_the_same_best_where_memory_is_learnt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = estimates(world_size=WORLD, global_batch=32)
    rest = RestBounds.of(of.config, "p", WORLD)

    def gib(layout: ParallelConfig) -> float:
        """Memory whose activations are two and a half times what is estimated."""
        return (rest.of_fullest_rank(layout) + 2.5 * of.activation_bytes(layout)) / GIB

    def best() -> str:
        answer, _ = searched(lambda one: of.step_seconds(one, 0.0), gib)
        assert answer.tried[0].fits
        return answer.tried[0].yaml

    result = best()
    monkeypatch.setattr(searches, "BATCH", 1)
    assert result == best()


def test_the_best_are_traced_on_their_fullest_packs() -> None:
    answers = Stated(pace, lambda _: 50, more_gib=2)
    result = search(SearchGoal(run_of(), "p", WORLD, GPU), answers)
    first, others = result.tried[:CONFIRMED], result.tried[CONFIRMED:]
    assert [row.config for row in first] == answers.full_seen
    assert {row.peak_bytes for row in first} == {52 * GIB}
    # Of the others it is estimated.
    assert all(row.more_bytes is not None and row.peak_bytes >= 50 * GIB for row in others)


def test_what_does_not_fit_with_its_fullest_packs_is_tried_with_more_recomputation() -> None:
    def gib(layout: ParallelConfig) -> float:
        return 40 if layout.recompute == "full" else 50

    answers = Stated(lambda one: pace(one) + (one.recompute == "full") / 2, gib, more_gib=30)
    result = search(SearchGoal(run_of(), "p", WORLD, GPU), answers)
    assert answers.full_seen[0].parallel.recompute == "none"
    best = result.tried[0]
    assert best.fits and best.more_bytes is None and best.peak_bytes == 70 * GIB
    assert best.config.parallel.recompute == "full"


def test_what_can_never_fit_is_not_traced() -> None:
    """32B on 16 GPUs: alone on each of them it would take 228 GB at least."""
    run = run_of("qwen3vl_32b")
    goal = SearchGoal(run, "p", WORLD, GPU)
    answers = Stated(lambda _: 1.0, lambda _: 70)
    result = search(goal, answers)
    assert 0 < result.too_large < result.legal
    bounds = RestBounds.of(run, "p", WORLD)
    assert all(bounds.of_fullest_rank(one) <= 77 * GIB for one in layouts(answers.seen))


def test_a_model_that_no_layout_holds_is_refused() -> None:
    goal = SearchGoal(run_of("qwen3vl_235b_a22b"), "p", WORLD, GPU)
    with pytest.raises(
        UserError, match=r"^world=16 GPUs cannot hold qwen3vl_235b_a22b .* 77\.0 GiB"
    ):
        search(goal, Stated(lambda _: 1.0, lambda _: 70))


def test_packs_that_cannot_be_dealt_are_refused() -> None:
    goal = SearchGoal(run_of(global_batch=1), "p", 77, GPU)
    with pytest.raises(
        UserError, match=r"^no layout is possible on world=77 ranks.*global_batch=1"
    ):
        search(goal, Stated(lambda _: 1.0, lambda _: 70))


# ---- estimates


WORK = StepWork(8192, 2000, 20_000_000, 18_000, 50_000_000)


def estimates(model: str = "qwen3vl_8b", world_size: int = 64, global_batch: int = 64) -> Estimates:
    return Estimates(run_of(model, global_batch), "p", world_size, GPU, WORK)


def seconds(estimate: Estimates, **layout: object) -> float:
    return estimate.step_seconds(ParallelConfig(**layout), 0.0)  # type: ignore[arg-type]


def test_estimated_times_follow_the_layout() -> None:
    of = estimates()
    assert seconds(of, recompute="full") > seconds(of, recompute="mlp") > seconds(of)
    assert seconds(of, pipeline=4) > seconds(of, pipeline=4, virtual_pipeline=3)
    # Sixteen tensor ranks are on two nodes, eight on one.
    one_node = Estimates(of.config, "p", 64, replace(GPU, node_ranks=16), WORK)
    assert seconds(of, tensor=16) > 1.5 * seconds(one_node, tensor=16)
    exchanges = {name: seconds(of, context=2, context_exchange=name) for name in EXCHANGES}
    # Traced with tensor 2 on 16 GPUs they are a tenth apart.
    assert exchanges["gather"] == pytest.approx(exchanges["ulysses"], rel=0.1)
    experts = estimates("qwen3vl_30b_a3b")
    assert seconds(experts, expert=16) > seconds(experts, expert=8) > seconds(experts)
    assert seconds(experts, expert_tensor=8) > seconds(experts, expert=8)


def test_estimated_time_of_one_gpu_is_its_operations() -> None:
    """8B with one pack of 8,192 tokens: some 50 TFLOP each forward, three times that in all, at 762 TFLOP/s."""
    one = estimates(world_size=1, global_batch=1)
    flops = sum(one.flops.values())
    assert seconds(one) == pytest.approx(flops / (989e12 * 0.77), rel=0.02)


def test_estimated_activations_follow_the_layout() -> None:
    of = estimates()

    def held(**layout: object) -> float:
        return of.activation_bytes(ParallelConfig(**layout))  # type: ignore[arg-type]

    assert held() > 5 * held(recompute="full")
    assert held(tensor=2) == pytest.approx(held() / 2)
    # The first of four stages keeps four micro-batches of a quarter of the layers.
    assert held(pipeline=4) > 0.9 * held()
    assert held(offload_activations=True) < 0.5 * held()
    mixture = replace(of, config=run_of("qwen3vl_30b_a3b"))
    experts, attention = ParallelConfig(), ParallelConfig(recompute="mlp")
    assert mixture.activation_bytes(experts) > 1.5 * mixture.activation_bytes(attention)


AGAIN_CHEAP = {"recompute": "norms_and_activations"}


@pytest.mark.parametrize(
    ("model", "supervised", "patches", "layout", "traced"),
    [
        ("qwen3vl_8b", 1709, 19092, {}, 61.43),
        ("qwen3vl_8b", 1861, 17864, {"recompute": "norms_and_activations"}, 37.76),
        ("qwen3vl_8b", 1861, 17864, {"recompute": "all_but_attention"}, 10.58),
        ("qwen3vl_8b", 1709, 19092, {"recompute": "mlp"}, 21.01),
        ("qwen3vl_8b", 1709, 19092, {"recompute": "full"}, 7.49),
        ("qwen3vl_8b", 1709, 19092, {"tensor": 2}, 30.66),
        ("qwen3vl_8b", 2048, 0, {}, 41.33),
        ("qwen3vl_8b", 2048, 0, {"recompute": "norms_and_activations"}, 27.27),
        ("qwen3vl_8b", 2048, 0, {"recompute": "mlp"}, 13.77),
        ("qwen3vl_8b", 2048, 0, {"recompute": "full"}, 5.81),
        ("qwen3vl_30b_a3b", 2048, 0, {"expert": 16}, 43.82),
        ("qwen3vl_30b_a3b", 1861, 17864, AGAIN_CHEAP | {"expert": 16}, 41.50),
        ("qwen3vl_30b_a3b", 1861, 17864, AGAIN_CHEAP, 32.81),
        ("qwen3vl_30b_a3b", 1709, 19092, {"expert": 16, "recompute": "mlp"}, 18.87),
        ("qwen3vl_30b_a3b", 2048, 0, {"expert": 16, "recompute": "full"}, 3.38),
    ],
)
def test_estimated_activations_are_near_traced_ones(
    model: str, supervised: int, patches: int, layout: dict[str, object], traced: float
) -> None:
    """What a traced step of 8,192 tokens needed on top of its memory at rest, in GiB."""
    work = StepWork(8192, supervised, 0, patches, 0)
    of = Estimates(run_of(model), "p", WORLD, GPU, work)
    estimated = of.activation_bytes(ParallelConfig(**layout)) / GIB  # type: ignore[arg-type]
    assert estimated == pytest.approx(traced, rel=0.05)
