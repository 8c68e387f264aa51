"""From a run's options to the plan of a phase: opens the datasets and weighs them. Imports no torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from visionloom.common.errors import UserError
from visionloom.common.progress import ProgressOf
from visionloom.data.config import DataConfig
from visionloom.data.encode.encode import encode
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.corpus import Corpus, cache_folder, media_hash
from visionloom.data.plan.cursor import Origin
from visionloom.data.plan.deal import CostModel
from visionloom.data.plan.parts import Parts
from visionloom.data.plan.plan import MixtureEntry, Plan, Settings
from visionloom.data.shards.sample import SampleError


def dataset_weights(data: DataConfig, mixture: Mapping[str, float]) -> dict[str, float]:
    """The weight of each dataset that is drawn from: of the mixture, or where it is empty of data.datasets.

    Raises UserError for unknown names and where nothing is left.
    """
    for name in mixture:
        if name not in data.datasets:
            raise UserError(
                f"mixture names {name}, which is not in data.datasets: {', '.join(data.datasets) or 'empty'}"
            )
    weights = dict(mixture) or {name: config.weight for name, config in data.datasets.items()}
    positive = {name: float(weight) for name, weight in weights.items() if weight > 0}
    if not positive:
        raise UserError(
            "no dataset has a weight above 0: name some in data.datasets or in the phase's mixture"
        )
    return positive


def open_corpora(
    data: DataConfig,
    names: Sequence[str],
    tokenizer: Tokenizer,
    processes: int = 0,
    report: ProgressOf | None = None,
) -> list[Corpus]:
    """Training datasets by name, counted by `processes` beside this one where no length table is kept.

    Raises UserError for one that is missing, with too large a share of samples that cannot be used, or without any supervised
    token.
    """
    corpora = [
        Corpus("data.datasets", name, data.datasets[name], data, tokenizer, processes, report)
        for name in names
    ]
    for corpus in corpora:
        bad = corpus.unreadable
        # All samples were looked at, so the share is exact, whatever the dataset's size.
        if len(bad) > data.max_bad_fraction * len(corpus.dataset):
            raise UserError(
                f"dataset {corpus.name}: {len(bad)} of {len(corpus.dataset)} samples cannot be used, more than"
                f" data.max_bad_fraction={data.max_bad_fraction:g} of them, the first: {_reason(corpus, int(bad[0]))}:"
                " mend or remove them, or raise data.max_bad_fraction"
            )
        _check_supervised(corpus)
    return corpora


def _reason(corpus: Corpus, index: int) -> str:
    """Why a sample cannot be used."""
    try:
        encode(corpus.dataset.sample(index), corpus.tokenizer, corpus.rules)
    except SampleError as error:
        return str(error)
    return "its bytes have changed since it was counted"


def make_plan(
    data: DataConfig,
    corpora: Sequence[Corpus],
    weights: Mapping[str, float],
    phase: str,
    sequence_length: int,
    global_batch: int,
    seed: int,
    cost: CostModel,
    origin: Origin | None = None,
) -> Plan:
    """The plan of a phase.

    Raises UserError for samples longer than a pack, by their dataset's policy, and for a dataset without a supervised token.
    """
    multiple = data.sample_token_multiple
    budget = int(data.max_patches_per_token * sequence_length)
    option = f"phases.{phase}.sequence_length"
    parts = [
        corpus.parts(sequence_length // multiple * multiple, budget, option) for corpus in corpora
    ]
    for corpus, found in zip(corpora, parts, strict=True):
        _check_supervised_parts(corpus, found, phase)
    settings = Settings(
        seed,
        "" if data.continue_draws else phase,
        sequence_length,
        global_batch,
        budget,
        data.packing_window_samples,
        multiple,
        data.max_samples_per_pack,
        data.shuffle_block_samples,
        data.weights_in,
        corpora[0].tokenizer.fingerprint[:8],
        media_hash(data.media),
    )
    sources = [
        _source(corpus, found, weights[corpus.name])
        for corpus, found in zip(corpora, parts, strict=True)
    ]
    return Plan(sources, settings, cost, origin, _plan_folder(data, corpora))


def _check_supervised(corpus: Corpus) -> None:
    """Refuse a dataset from which nothing can be learned."""
    if not corpus.lengths["supervised"].any():
        raise UserError(
            f"data.datasets.{corpus.name} ({corpus.config.path}): none of its {len(corpus.dataset)} samples has a supervised"
            " token, so nothing can be learned from it: every `loss` of its turns and elements or every `weight` of its samples"
            f" is 0, or no turn is an assistant's: convert it anew with a loss above 0, or {_leave_out(corpus)}"
        )


def _check_supervised_parts(corpus: Corpus, parts: Parts, phase: str) -> None:
    """Refuse a dataset of which a phase uses only what has no loss."""
    if not parts.total("supervised"):
        raise UserError(
            f"data.datasets.{corpus.name} ({corpus.config.path}): nothing of it that phases.{phase} can use has a supervised"
            f" token, only what is longer than a pack: raise phases.{phase}.sequence_length, set another"
            f" data.datasets.{corpus.name}.over_length, or {_leave_out(corpus)}"
        )


def _leave_out(corpus: Corpus) -> str:
    return f"leave it out of the phase's mixture (data.datasets.{corpus.name}.weight=0 where that is empty)"


def _source(corpus: Corpus, parts: Parts, weight: float) -> MixtureEntry:
    return MixtureEntry(
        corpus.name, weight, parts, corpus.dataset.fingerprint[:16], corpus.config.over_length
    )


def _plan_folder(data: DataConfig, corpora: Sequence[Corpus]) -> Path:
    """Plans span datasets: without data.cache they are kept beside the first one's tables."""
    return cache_folder(data, corpora[0].config.path)
