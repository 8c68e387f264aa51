"""From a run's options to the plan of a phase: opens the datasets and weighs them. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig
from visionloom.data.encode.encode import encode
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.cursor import Origin
from visionloom.data.plan.dataset_with_lengths import (
    DatasetWithLengths,
    cache_folder,
    media_hash,
)
from visionloom.data.plan.deal import CostModel
from visionloom.data.plan.parts import Parts
from visionloom.data.plan.plan import MixtureEntry, Plan, Settings
from visionloom.data.plan.resumable import NO_HELP, CountingHelp
from visionloom.data.shards.sample import SampleError


@dataclass(frozen=True)
class StreamOptions:
    """What the training stream of a phase is made from, apart from where its draws begin."""

    data: DataConfig
    """The input of the run."""
    phase_name: str
    """Its order of samples is its own, unless data.continue_draws."""
    sequence_length: int
    """Tokens of a pack."""
    global_batch: int
    """Packs of a step."""
    mixture: Mapping[str, float]
    """Weight of each dataset; empty: all of data.datasets with their own."""
    loss: str
    """How samples are weighed: token, sqrt or sample."""
    seed: int
    """Of all orders."""
    cost: CostModel = field(default_factory=CostModel)
    """Work of a pack; it balances ranks only."""
    teacher: str = ""
    """Folder of a stored teacher, whose rows ride in the packs; empty: none."""

    @property
    def patch_budget(self) -> int:
        """Return the patches that a pack holds."""
        return int(self.data.max_patches_per_token * self.sequence_length)

    @property
    def longest_sample(self) -> int:
        """Return the tokens of the longest sample that a pack holds, with the padding that belongs to it."""
        multiple = self.data.sample_token_multiple
        return self.sequence_length // multiple * multiple


def dataset_weights(data: DataConfig, mixture: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of each dataset that is drawn from: of the mixture, or where it is empty of data.datasets.

    Raises:
        UserError: for unknown names and where nothing is left.
    """
    for name in mixture:
        if name not in data.datasets:
            raise UserError(
                f"mixture names {name}, which is not in data.datasets: {', '.join(data.datasets) or 'empty'}"
            )
    positive = data.drawn_weights(mixture)
    if not positive:
        raise UserError(
            "no dataset has a weight above 0: name some in data.datasets or in the phase's mixture"
        )
    return positive


def open_datasets(
    data: DataConfig,
    names: Sequence[str],
    tokenizer: Tokenizer,
    helpers: CountingHelp = NO_HELP,
) -> list[DatasetWithLengths]:
    """Open training datasets by name, with their lengths; `helpers` count those of which no table is kept.

    Raises:
        UserError: for one that is missing, with too large a share of samples that cannot be used, or without any
            supervised token.
    """
    datasets = []
    for name in names:
        config = data.datasets[name]
        datasets.append(DatasetWithLengths("data.datasets", name, config, data, tokenizer, helpers))
    for dataset in datasets:
        _check_readable(dataset, data.max_bad_fraction)
        _check_supervised(dataset)
    return datasets


def open_plan(
    options: StreamOptions, datasets: Sequence[DatasetWithLengths], origin: Origin | None = None
) -> Plan:
    """Plan a phase: the one way to a plan, for training and for those who only look at it.

    Args:
        options: of the stream.
        datasets: those of the phase's mixture, opened by `open_datasets`.
        origin: where the draws begin; None: at the beginning.

    Raises:
        UserError: for samples longer than a pack, by their dataset's policy, and for a dataset without a supervised token.
    """
    weights = dataset_weights(options.data, options.mixture)
    length_option = f"phases.{options.phase_name}.sequence_length"
    entries = []
    for dataset in datasets:
        parts = dataset.parts(options.longest_sample, options.patch_budget, length_option)
        _check_supervised_parts(dataset, parts, options.phase_name)
        # 64 bits tell datasets apart, and 20 of them fit a state of 4 KB
        content = dataset.shards.fingerprint[:16]
        over_length = dataset.config.over_length
        entries.append(
            MixtureEntry(dataset.name, weights[dataset.name], parts, content, over_length)
        )
    settings = _settings(options, datasets[0].tokenizer)
    # a plan spans datasets: without data.cache it is kept with the tables of the first one
    cache = cache_folder(options.data, datasets[0].config.path)
    return Plan(entries, settings, options.cost, origin, cache)


def settings_without_data(options: StreamOptions) -> Settings:
    """Return what decides the packs of samples that are only lengths: nothing is read, so neighbours need not stay together."""
    data = options.data
    return Settings(
        seed=options.seed,
        phase=options.phase_name,
        sequence_length=options.sequence_length,
        global_batch=options.global_batch,
        patch_budget=options.patch_budget,
        packing_window_samples=data.packing_window_samples,
        sample_token_multiple=data.sample_token_multiple,
        max_samples_per_pack=data.max_samples_per_pack,
    )


def _settings(options: StreamOptions, tokenizer: Tokenizer) -> Settings:
    """Return what decides the packs, without what only says how they are trained on."""
    data = options.data
    return replace(
        settings_without_data(options),
        phase="" if data.continue_draws else options.phase_name,
        shuffle_block_samples=data.shuffle_block_samples,
        weights_in=data.weights_in,
        tokenizer=tokenizer.fingerprint[:8],
        media=media_hash(data.media, data.chat_format),
    )


def _check_readable(dataset: DatasetWithLengths, max_bad_fraction: float) -> None:
    """Refuse a dataset with too large a share of samples that cannot be used."""
    # All samples were looked at, so the share is exact, whatever the dataset's size.
    bad, size = dataset.unreadable, len(dataset.shards)
    if len(bad) <= max_bad_fraction * size:
        return
    try:
        encode(dataset.shards.sample(int(bad[0])), dataset.tokenizer, dataset.rules)
        reason = "its bytes have changed since it was counted"
    except SampleError as error:
        reason = str(error)
    raise UserError(
        f"dataset {dataset.name}: {len(bad)} of {size} samples cannot be used, more than"
        f" data.max_bad_fraction={max_bad_fraction:g} of them, the first: {reason}:"
        " mend or remove them, or raise data.max_bad_fraction"
    )


def _check_supervised(dataset: DatasetWithLengths) -> None:
    """Refuse a dataset from which nothing can be learned."""
    if not dataset.lengths["supervised"].any():
        raise UserError(
            f"data.datasets.{dataset.name} ({dataset.config.path}): none of its {len(dataset.shards)} samples has a supervised"
            " token, so nothing can be learned from it: every `loss` of its turns and elements or every `weight` of its samples"
            f" is 0, or no turn is an assistant's: convert it anew with a loss above 0, or {_leave_out(dataset)}"
        )


def _check_supervised_parts(dataset: DatasetWithLengths, parts: Parts, phase: str) -> None:
    """Refuse a dataset of which a phase uses only what has no loss."""
    if not parts.total("supervised"):
        raise UserError(
            f"data.datasets.{dataset.name} ({dataset.config.path}): nothing of it that phases.{phase} can use has a supervised"
            f" token, only what is longer than a pack: raise phases.{phase}.sequence_length, set another"
            f" data.datasets.{dataset.name}.over_length, or {_leave_out(dataset)}"
        )


def _leave_out(dataset: DatasetWithLengths) -> str:
    return f"leave it out of the phase's mixture (data.datasets.{dataset.name}.weight=0 where that is empty)"
