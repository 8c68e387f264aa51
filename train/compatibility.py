"""Refuse a checkpoint that does not fit a model or an evaluation; changes.py has what a resumed run may change."""

from dataclasses import asdict

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig
from visionloom.model.config import ModelConfig
from visionloom.model.huggingface.config import NOT_THE_MODEL
from visionloom.train.checkpoint.read import Checkpoint
from visionloom.train.checkpoint.state_file import lora_of, model_of, stored_inputs


def check_same_model(source: Checkpoint, model: ModelConfig) -> None:
    """Refuse a checkpoint of another model; UserError with the first field that differs."""
    ours, theirs = asdict(model), asdict(model_of(source.run_state))
    for section in ("text", "vision"):
        for field, value in ours[section].items():
            held = theirs[section][field]
            if field not in NOT_THE_MODEL and held != value:
                raise UserError(
                    f"{source.folder} holds another model: model.{section}.{field} is {held} there and {value} here;"
                    " set run.name to start a new run"
                )


def check_same_adapters(source: Checkpoint, rank: int) -> None:
    """Refuse to evaluate a checkpoint with adapters of another rank than `rank` of lora.rank; 0: whole weights."""
    lora = lora_of(source.run_state)
    stored = lora.rank if lora is not None else 0
    if stored != rank:
        content = f"adapters of rank {stored}" if stored else "whole weights, no adapters"
        raise UserError(f"{source.folder} holds {content}: evaluate it with lora.rank={stored}")


def data_differences(source: Checkpoint, data: DataConfig) -> list[str]:
    """Name the rules by which samples were prepared otherwise when the checkpoint was trained, sorted."""
    inputs = stored_inputs(source.run_state)
    # Checkpoints of older versions, and imported ones, do not say: nothing is known to differ.
    if inputs is None:
        return []
    differences = []
    if inputs.chat_format != data.chat_format:
        differences.append(f"data.chat_format {data.chat_format} instead of {inputs.chat_format}")
    for field, value in asdict(data.media).items():
        if field in inputs.media and inputs.media[field] != value:
            differences.append(f"data.media.{field} {value} instead of {inputs.media[field]}")
    return sorted(differences)
