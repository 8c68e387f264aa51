"""A run: its phases in order, each built, resumed or started, trained and saved."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.open import dataset_weights, open_corpora
from visionloom.data.stream.train_stream import PackStream
from visionloom.model.huggingface.config import NOT_THE_MODEL
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel import topology as topologies
from visionloom.parallel.topology import Topology
from visionloom.train import status
from visionloom.train.build import Stage, add_adapters, build_model, build_stage, build_stream, redraw
from visionloom.train.changes import Changed, changes
from visionloom.train.checkpoint import read as checkpoint
from visionloom.train.checkpoint.read import Checkpoint
from visionloom.train.checkpoint.state_file import CHECKPOINTS, lora_of, model_of, stored_inputs
from visionloom.train.checkpoint.write import Saver, check_room, first_fault, sweep
from visionloom.train.config import LoggingConfig, RunConfig
from visionloom.train.evaluate import evaluate_run, held_out_losses
from visionloom.train.exchange.companions import SETTINGS_OF_RUN, carry_into_run
from visionloom.train.loop import fit, log_error
from visionloom.train.lost import lost_checkpoints, move_aside
from visionloom.train.metrics import RunLog
from visionloom.train.progress import Screen
from visionloom.train.trackers import Trackers
from visionloom.train.weights.load_huggingface import load_huggingface

SLOW_SECONDS = 1.0
"""A save that is not written when the next one is due, and holds training up for longer, is told."""


def run_folder(config: RunConfig) -> Path:
    """Where a run lives: run.folder, or runs/<run.name>."""
    return Path(config.run.folder or f"runs/{config.run.name}")


def open_topology(config: RunConfig) -> Topology:
    """The device, threads and process groups of this rank."""
    device = topologies.choose_device(config.run.device)
    topologies.set_threads(config.run.threads)
    if config.run.deterministic:
        topologies.be_deterministic()
    return topologies.start(config.parallel, device, config.run.seed)


def pretrain(config: RunConfig) -> None:
    """Run all phases of a recipe, from where an earlier start left off; raises UserError for what the user can mend."""
    started = time.perf_counter()
    topology = open_topology(config)
    folder = run_folder(config)
    log = RunLog(folder) if topology.is_main else None
    screen = Screen(topology.is_main, config.logging.every_steps)
    run = Run(config, topology, folder, log, screen)
    run.resume()
    run.check_data()
    for name in config.phases:
        run.phase(name)
    if log is not None:
        log.event("done", step=run.step)
    screen.say(f"done in {time.perf_counter() - started:.0f} s: {folder}")
    if config.run.evaluate_at_end:
        run.trackers.evaluation(evaluate_run(config, run.topology, run.chunks, folder, run.step, screen))
    run.trackers.close()
    if fault := first_fault(log.fault if log is not None else ""):
        raise log_error(fault, run.step)
    topologies.stop()


def evaluate(config: RunConfig, source: str = "") -> dict[str, Any]:
    """Evaluate a checkpoint on data.validation and write eval.json and the report into the run's folder.

    Args:
        config: of the run; its layout may differ from the one that trained.
        source: the checkpoint's folder; empty: the newest whole one of the run.

    Returns:
        what `evaluate_run` returns. Raises UserError if there is no whole checkpoint.
    """
    topology = open_topology(config)
    folder = run_folder(config)
    screen = Screen(topology.is_main, config.logging.every_steps)
    run = Run(config, topology, folder, None, screen)
    run.take(source)
    if topology.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    results = evaluate_run(config, topology, run.chunks, folder, run.step, screen)
    topology.barrier()
    topologies.stop()
    return results


class Run:
    """The state that passes from phase to phase."""

    def __init__(self, config: RunConfig, topology: Topology, folder: Path, log: RunLog | None, screen: Screen) -> None:
        self.config, self.topology, self.folder, self.log, self.screen = config, topology, folder, log, screen
        self.latest: Checkpoint | None = None
        self.step = 0
        self.losses: dict[str, float] = {}
        wanted = config.logging if log is not None else LoggingConfig()
        self.trackers = Trackers(wanted, folder, asdict(config), config.run.name)
        self._chunks: list[Qwen3VL] | None = None

    @property
    def chunks(self) -> list[Qwen3VL]:
        """The model's chunks on this rank as the last phase left them."""
        if self._chunks is None:
            self._chunks = self._weights()
        return self._chunks

    def resume(self) -> None:
        """Find the newest whole checkpoint and rewind the metrics to it."""
        if self.log is not None:
            sweep(self.folder)
        self._tell_last_end()
        self.topology.barrier()
        self.latest, damaged = checkpoint.newest(self.folder, self.topology)
        for line in damaged:
            self._event("damaged_checkpoint", detail=line)
            self.screen.say(f"passing over a damaged checkpoint: {line}")
        if self.latest is not None:
            changed = changes(self.config, self.latest.progress, str(self.latest.folder))
            self.step = self.latest.progress.step
            self._event("resume", step=self.step, folder=str(self.latest.folder))
            self.screen.say(f"resuming after step {self.step} from {self.latest.folder}")
            self._tell_changes(changed)
        else:
            self._begin_anew(damaged)
        status.current.at(self.step)
        if self.log is not None:  # only now: a start that is refused leaves what describes the run as it is
            with replacing(self.folder / SETTINGS_OF_RUN) as file:
                file.write(yaml.safe_dump(asdict(self.config), sort_keys=False).encode())
            self.log.take_waiting(self.folder / CHECKPOINTS)
            self.log.rewind(self.step)

    def _tell_last_end(self) -> None:
        """Say how the start before this one ended, if not as it should."""
        before = status.current.before
        if before is None or before.state == "done":
            return
        cause = before.cause or f"killed without a word, with process {before.pid} on {before.host}"
        self._event("last_end", cause=cause, rank=before.rank, step=before.step)
        after = f" after step {before.step}" if before.step else ""
        self.screen.say(f"the start before this one ended{after}: {cause.splitlines()[0]}")

    def _begin_anew(self, damaged: list[str]) -> None:
        """Begin at step 0; a run that has had checkpoints does so only when told to, and keeps what is left of it."""
        fault = first_fault(lost_checkpoints(self.folder, damaged) if self.topology.is_main else "")
        if not fault:
            return
        if not self.config.run.start_anew:
            raise UserError(
                f"{fault}: put one back, set run.name to start another run, or begin this one at step 0 with run.start_anew=true,"
                " which moves aside what is left"
            )
        if self.log is not None:
            self._event("start_anew", cause=fault, kept=str(move_aside(self.folder)))
        self.screen.say(f"beginning at step 0: {fault}")

    def _tell_changes(self, changed: list[Changed]) -> None:
        """Say which settings the run goes on with instead of its checkpoint's."""
        for each in changed:
            self._event("settings_changed", step=self.step, option=each.option, was=each.was, now=each.now)
            self.screen.say(f"goes on with other settings: {each}")

    def check_data(self) -> None:
        """Open the datasets of all phases that are left: one that cannot be trained on is an error before the first step."""
        left = [phase for name, phase in self.config.phases.items() if self._done(name) < phase.total_steps]
        names = dict.fromkeys(name for phase in left for name in dataset_weights(self.config.data, phase.mixture))
        open_corpora(self.config.data, list(names), Tokenizer(self.config.data.tokenizer))

    def take(self, source: str) -> None:
        """Take the weights of a checkpoint's folder, or of the newest whole one of the run if `source` is empty."""
        if source:
            self.latest = checkpoint.whole(Path(source), "checkpoint", self.topology)
        else:
            self.latest, damaged = checkpoint.newest(self.folder, self.topology)
            if self.latest is None:
                found = f"only damaged checkpoints, {damaged[0]}" if damaged else "no checkpoint"
                raise UserError(f"{self.folder} holds {found}: train the run first, or name one with checkpoint=FOLDER")
        self._check(self.latest)
        lora = lora_of(self.latest.progress)
        rank = lora.rank if lora is not None else 0
        if rank != self.config.lora.rank:
            held = f"adapters of rank {rank}" if rank else "whole weights, no adapters"
            raise UserError(f"{self.latest.folder} holds {held}: evaluate it with lora.rank={rank}")
        self.step = self.latest.progress.step
        status.current.at(self.step)
        self.screen.say(f"evaluating {self.latest.folder}")
        inputs, here = stored_inputs(self.latest.progress), asdict(self.config.data.media)
        trained = inputs.media if inputs is not None else {}
        if other := [
            f"{key} {here[key]} instead of {trained[key]}" for key in here.keys() & trained.keys() if here[key] != trained[key]
        ]:
            self.screen.say(f"pictures are prepared otherwise than in training: data.media has {', '.join(sorted(other))}")

    def phase(self, name: str) -> None:
        """Train one phase, or what is left of it."""
        done = self._done(name)
        settings = self.config.phases[name]
        if done >= settings.total_steps:
            return
        self.topology = topologies.change(self.topology, settings.parallel or self.config.parallel, self.config.run.seed)
        before = self.latest.progress.data if self.latest is not None and not done else None
        stream = build_stream(self.config, name, self.folder, self.topology, before)
        if not done and self.topology.is_main:
            stream.report_unreadable()
        stage = self._stage(name, done, stream)
        self._tell_losses(name, stream)
        if self.log is not None:  # only now: a start that is refused must not replace the files of checkpoints that are there
            carry_into_run(self.config, self.folder)
        check_room(self.folder, stage)
        self._event("phase_start", phase=name, step=self.step, phase_step=done, phase_steps=settings.total_steps)
        if not done:
            self._validate(stage, unchanged=not settings.fresh)
        self.screen.begin(name, done, settings.total_steps)
        try:
            saver = Saver(self.folder, self.config.checkpoint, self._saved)
            self.step = fit(stage, saver, self.log, self._report, done, self.step, self.config.data.workers)
        finally:
            self.screen.end()
        self._validate(stage)
        self._event("phase_end", phase=name, step=self.step)
        self.latest = checkpoint.read(checkpoint.folder_of(self.folder, name, self.step))
        self._chunks = None

    def _tell_losses(self, name: str, stream: PackStream) -> None:
        """Say what of a phase's data is not trained on, and what is without a loss."""
        for dataset, (samples, tokens) in stream.dropped.items():
            if samples or tokens:
                self._event("dropped", phase=name, dataset=dataset, samples=samples, tokens=tokens)
                policy = self.config.data.datasets[dataset].over_length
                self.screen.say(
                    f"{name}: {samples} samples and in all {tokens} tokens of {dataset} are left out"
                    f" (unreadable, or longer than a pack with over_length={policy})"
                )
        for dataset, (samples, size) in stream.unsupervised.items():
            if samples:
                self._event("unsupervised", phase=name, dataset=dataset, samples=samples)
                self.screen.say(
                    f"warning: {name}: {samples} of the {size} samples of {dataset} have no supervised token (every loss or the"
                    " weight is 0): they cost time and teach nothing; leave them out of the dataset"
                )

    def _done(self, name: str) -> int:
        """Optimizer steps of a phase that are already in the newest checkpoint."""
        if self.latest is None:
            return 0
        order = list(self.config.phases)
        here, there = order.index(name), order.index(self.latest.progress.phase)
        if here != there:
            return self.config.phases[name].total_steps if here < there else 0
        return self.latest.progress.phase_step

    def _stage(self, name: str, done: int, stream: PackStream) -> Stage:
        if done and self.latest is not None:
            for change in stream.load_state(self.latest.progress.data):
                self._event("data_changed", phase=name, step=self.step, detail=change)
                self.screen.say(f"{name}: goes on with other data: {change}")
            # Adapters go on from a checkpoint that holds nothing but them.
            chunks = self._initial() if self.config.lora.rank else build_model(self.config, self.topology, drawn=False)
            stage = build_stage(self.config, name, self.topology, chunks, stream)
            checkpoint.load_stage(self.latest, stage)
            return stage
        chunks = self._weights()
        redraw(chunks, self.config, name, self.topology)
        return build_stage(self.config, name, self.topology, chunks, stream)

    def _weights(self) -> list[Qwen3VL]:
        """A fresh model with the newest weights: of the last phase, or what the run begins with."""
        if self.latest is None:
            return self._initial()
        chunks = self._initial() if self.config.lora.rank else build_model(self.config, self.topology, drawn=False)
        checkpoint.load_weights(self.latest, chunks, self.topology)
        return chunks

    def _initial(self) -> list[Qwen3VL]:
        """What a run begins with: the weights of init.huggingface, of init.checkpoint or random ones, and adapters if it trains some."""
        init = self.config.init
        chunks = build_model(self.config, self.topology, drawn=not (init.huggingface or init.checkpoint))
        if init.huggingface:
            load_huggingface(Path(init.huggingface), chunks, self.config.model, self.topology)
        if init.checkpoint:
            source = checkpoint.whole(Path(init.checkpoint), "init.checkpoint", self.topology)
            self._check(source)
            if source.progress.lora:
                raise UserError(
                    f"init.checkpoint={source.folder} holds adapters only: name the checkpoint that they were trained on,"
                    " and export them for lora.adapter"
                )
            checkpoint.load_weights(source, chunks, self.topology)
        if self.config.lora.rank:
            add_adapters(chunks, self.config, self.topology)
        return chunks

    def _check(self, source: Checkpoint) -> None:
        """Refuse a checkpoint of another model with what differs; one that a run goes on from is under `changes`."""
        ours, theirs = asdict(self.config.model), asdict(model_of(source.progress))
        for part in ("text", "vision"):
            held = theirs[part]
            changed = [key for key, value in ours[part].items() if key not in NOT_THE_MODEL and held[key] != value]
            if changed:
                raise UserError(
                    f"{source.folder} holds another model: model.{part}.{changed[0]} is {held[changed[0]]} there"
                    f" and {ours[part][changed[0]]} here; set run.name to start a new run"
                )

    def _validate(self, stage: Stage, unchanged: bool = False) -> None:
        """Held-out losses as the phase stands, as an event; those of the last phase's end if the weights are `unchanged`."""
        samples = self.config.evaluation.phase_samples
        if samples and self.config.data.validation:
            if not (unchanged and self.losses):
                self.losses = held_out_losses(self.config, self.topology, stage.chunks, samples, self.screen)
            self._event("validation", phase=stage.name, step=self.step, loss=self.losses)
            self.trackers.evaluation({"step": self.step, "loss": self.losses})

    def _report(self, line: dict[str, Any]) -> None:
        """Show and track one optimizer step."""
        status.current.at(line["step"])
        self.screen.step(line)
        self.trackers.step(line)

    def _saved(self, event: str, **fields: Any) -> None:
        """Log a checkpoint, and show one that failed or held up training."""
        self._event(event, **fields)
        if fields.get("waited_seconds", 0.0) > SLOW_SECONDS:
            self.screen.say(
                f"warning: training has waited {fields['waited_seconds']:.1f} s for {fields['folder']}, which was written at"
                f" {fields['mb_per_second']} MB/s: raise checkpoint.every_steps or use faster storage"
            )
        if event == "checkpoint_failed":
            self.screen.say(f"warning: {fields['folder']} could not be saved: {fields['cause']}; going on")

    def _event(self, event: str, **fields: Any) -> None:
        if self.log is not None:
            self.log.event(event, **fields)
