"""Random small runs: configurations drawn from values that dependencies may not take, and one optimizer step of each.

Every one must be refused by RunConfig.all_problems, which imports no torch, or take a finite step.
"""

import copy
import math
import operator
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from visionloom.model.config import ModelConfig, TextConfig, VisionConfig
from visionloom.parallel.config import ParallelConfig
from visionloom.train.config import InitConfig, RunConfig, RunSection
from visionloom.train.phase.config import PhaseConfig

OPTIONS: dict[str, list[Any]] = {
    "model.text.layers": [0, 1, 2, 3, 4, 5],
    "model.text.hidden_size": [-8, 1, 7, 20, 30, 32, 33, 36, 40],
    "model.text.ffn_hidden_size": [0, 1, 7, 31, 48],
    "model.text.heads": [0, 1, 2, 3, 4, 5, 6, 8],
    "model.text.kv_heads": [0, 1, 2, 3, 4, 8],
    "model.text.head_dim": [0, 1, 2, 7, 8, 10, 12, 16],
    "model.text.mrope_section": [[], [4], [2, 1, 1], [4, 0, 0], [1, 2, 1], [5, -1, 0], [3, 1, 1], [4, 2, 2], [0, 0, 1], [2, 2, 0], [8, 0, 0]],
    "model.text.vocab_size": [94, 95, 96, 97, 100],
    "model.text.rope_theta": [-1.0, 0.0, 1.0, 1e4, math.inf, math.nan],
    "model.text.norm_epsilon": [-1e-6, 0.0, 1e-5, math.inf, math.nan],
    "model.text.initializer_range": [-0.1, 0.0, 0.02, math.inf, math.nan],
    "model.text.max_positions": [0, 1, 8, 4096],
    "model.text.tie_embeddings": [True, False],
    "model.text.experts": [-1, 0, 1, 2, 3, 4, 5, 6],
    "model.text.experts_per_token": [-1, 0, 1, 2, 3, 4],
    "model.text.expert_ffn_hidden_size": [0, 1, 2, 4, 6, 8, 12, 16, 20, 24, 32],
    "model.text.balance_coefficient": [-1.0, 0.0, 0.01, math.inf, math.nan],
    "model.vision.depth": [0, 1, 2, 3, 4],
    "model.vision.hidden_size": [0, 6, 8, 12, 15, 16, 18, 24, 32],
    "model.vision.heads": [0, 1, 2, 3, 4, 8],
    "model.vision.ffn_hidden_size": [0, 1, 5, 24],
    "model.vision.deepstack_layers": [[], [0], [1, 0], [1, 1], [0, 1, 2], [-1], [2, 3], [0, 2]],
    "model.vision.position_table": [0, 1, 2, 3, 8],
    "model.vision.patch_size": [0, 8, 14, 16],
    "model.vision.temporal_patch_size": [0, 1, 2, 3],
    "model.vision.spatial_merge_size": [0, 1, 2, 3],
    "model.vision.channels": [0, 1, 3, 4],
    "model.vision.norm_epsilon": [-1e-6, 0.0, 1e-6, math.nan],
    "model.vision.initializer_range": [-0.1, 0.0, 0.02, math.inf],
    "parallel.tensor": [0, 1, 2, 3, 4],
    "parallel.pipeline": [0, 1, 2, 3],
    "parallel.virtual_pipeline": [None, 0, 1, 2, 3],
    "parallel.context": [0, 1, 2, 3],
    "parallel.context_exchange": ["gather", "ulysses", "none"],
    "parallel.expert": [0, 1, 2, 3],
    "parallel.expert_tensor": [None, 0, 1, 2],
    "parallel.sequence": [None, True, False],
    "parallel.pipeline_layout": [None, "EttL", "Ett|L", "E|ttL", "Et|tL", "Et|t|L", "E|t|tL", "Et|t||L", "ttL", "E|L", "", "Et*2L", "Et*0|t*2L"],
    "parallel.recompute": ["none", "norms_and_activations", "mlp", "block", "all_but_attention", "full", "some"],
    "parallel.recompute_layers": [-1, 0, 1, 3],
    "parallel.offload_activations": [False, True],
    "lora.rank": [-1, 0, 1, 3, 4, 8],
    "lora.alpha": [0.0, 1.0, 16.0, math.nan],
    "lora.dropout": [0.0, 0.1, 1.0, math.nan],
    "lora.groups": [["language"], ["vision"], ["merger"], ["vision", "merger", "language"], []],
    "lora.targets": [["*"], ["linear_qkv"], ["linear_fc1"], ["linear_fc2", "proj"], []],
    "run.precision": ["fp32", "bf16", "auto", "fp16"],
    "data.sample_token_multiple": [0, 1, 2, 3, 4, 8],
    "phases.p.sequence_length": [0, 88, 89, 90, 92, 96],
    "phases.p.global_batch": [0, 1, 2, 3, 4],
    "phases.p.micro_batch": [0, 1, 2],
    "phases.p.trainable": [["language"], ["vision"], ["merger"], ["vision", "merger", "language"], []],
    "phases.p.steps": [0, 1, 3],
    "phases.p.lr": [-1.0, 0.0, 1e-3, math.nan],
    "phases.p.lr_vision": [None, 0.0, 1e-3],
    "phases.p.lr_min_ratio": [0.0, 0.5, 2.0],
    "phases.p.warmup_steps": [-1, 0, 1],
    "phases.p.schedule": ["cosine", "wsd", "linear", "constant"],
    "phases.p.decay_steps": [None, 0, 1, 2],
    "optim.beta1": [0.0, 0.9, 1.0],
    "optim.epsilon": [-1.0, 0.0, 1e-8, math.nan],
    "optim.weight_decay": [-1.0, 0.0, 0.1, math.nan],
    "optim.clip_grad": [-1.0, 0.0, 1.0, math.nan, math.inf],
}  # fmt: skip
"""Values of each option, possible and impossible ones."""
PARTS: list[list[Any]] = [[5, (4, 6), 9], [21], [2, (2, 4, 4), 3, (2, 2), 11]]
"""The samples of a pack: text lengths, images and videos in patches; at most 88 tokens in all, padded to multiples of 8."""


@dataclass(frozen=True)
class Draw:
    """One configuration, as the words that differ from a possible one."""

    ranks: int
    words: dict[str, Any] = field(default_factory=dict)

    def config(self) -> RunConfig:
        """The run."""
        made = base(self.words.get("model.text.experts", 0), self.ranks)
        for option, value in self.words.items():
            *parents, name = option.split(".")
            owner: Any = made
            for parent in parents:
                owner = (
                    owner[parent] if isinstance(owner, dict) else operator.attrgetter(parent)(owner)
                )
            setattr(owner, name, copy.deepcopy(value))
        return made


def base(experts: int, ranks: int) -> RunConfig:
    """A possible run of a very small model."""
    text = TextConfig(
        layers=2, hidden_size=32, ffn_hidden_size=48, heads=4, kv_heads=2, head_dim=8, vocab_size=96, rope_theta=1e4,
        mrope_section=[2, 1, 1], max_positions=4096, experts=experts, experts_per_token=min(2, max(experts, 0)),
        expert_ffn_hidden_size=16 if experts else 0,
    )  # fmt: skip
    vision = VisionConfig(
        depth=3,
        hidden_size=16,
        heads=2,
        ffn_hidden_size=24,
        deepstack_layers=[0, 1],
        position_table=4,
    )
    phase = PhaseConfig(sequence_length=96, global_batch=2 * ranks, steps=2, lr=1e-3)
    return RunConfig(
        run=RunSection(name="search", device="cpu", precision="fp32"),
        model=ModelConfig("search", text=text, vision=vision),
        init=InitConfig(checkpoint="somewhere"),
        parallel=ParallelConfig(),
        phases={"p": phase},
    )


def draw(seed: int, ranks: int, most: int = 12) -> Draw:
    """Up to `most` options with random values; those that are refused are mostly left out, so that many runs are possible."""
    chance = random.Random(f"{ranks} {seed}")
    wanted = {
        option: chance.choice(OPTIONS[option])
        for option in chance.sample(sorted(OPTIONS), chance.randint(1, most))
    }
    if chance.random() < 0.5:
        wanted = {"model.text.experts": chance.choice([1, 2, 4, 6])} | wanted
    if chance.random() < 0.3:
        wanted = {"lora.rank": chance.choice([3, 8])} | wanted
    if ranks > 1 and chance.random() < 0.8:
        axis = chance.choice(["tensor", "pipeline", "context", "expert", "expert_tensor"])
        wanted = {
            f"parallel.{axis}": 2,
            "data.sample_token_multiple": chance.choice([4, 8]),
        } | wanted
    drawn = Draw(ranks)
    for option, value in wanted.items():
        longer = Draw(ranks, drawn.words | {option: value})
        if chance.random() < 0.2 or not longer.config().all_problems(ranks):
            drawn = longer
    return drawn


def step(drawn: Draw) -> tuple[float, float, bool]:
    """Loss and gradient norm of the run's first step, and whether all weights are finite after it. Runs on every rank."""
    import torch

    from visionloom.model import kept
    from visionloom.model.lora import apply_lora
    from visionloom.model.qwen3vl import Qwen3VL
    from visionloom.model.sharding import draw_weights
    from visionloom.parallel import topology as topologies
    from visionloom.tests.model.reference import (
        make_example,
        make_pack,
        reference_model,
        tiny_config,
    )
    from visionloom.tests.train.layouts import deal
    from visionloom.train.build import build_trainer, model_dtype
    from visionloom.train.step import train_step

    kept.LEAST_BYTES = 0  # a small model's activations are all small
    config = drawn.config()
    phase, device = config.phases["p"], torch.device("cpu")
    topology = topologies.start(config.parallel, device)
    numbers = config.parallel.chunk_numbers
    chunks = [
        Qwen3VL(config.model, topology, model_dtype(config.run.precision, device), number)
        for number in numbers
    ]
    for chunk in chunks:
        draw_weights(chunk, config.model, 1, topology)
    if config.lora.rank:
        apply_lora(chunks, config.lora, topology, 1)
    theirs = reference_model(tiny_config(), 0)
    packs = [
        make_pack(theirs, [make_example(parts, seed) for parts in PARTS], phase.sequence_length * phase.micro_batch, config.data.sample_token_multiple)
        for seed in range(phase.global_batch // phase.micro_batch)
    ]  # fmt: skip
    tokenizer = SimpleNamespace(fingerprint="")
    stream: Any = SimpleNamespace(datasets=[SimpleNamespace(name="test")], tokenizer=tokenizer)
    stage = build_trainer(config, "p", topology, chunks, stream)
    done = train_step(stage, deal(packs, topology, False))  # type: ignore[arg-type]
    finite = all(
        bool(parameter.isfinite().all()) for chunk in chunks for parameter in chunk.parameters()
    )
    return done.loss, done.grad_norm, finite
