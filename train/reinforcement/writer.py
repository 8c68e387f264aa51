"""Write rollouts: the policy answers prompts, rewards judge the answers, and groups that teach nothing are replaced."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import torch.distributed as dist

from visionloom.common import pulse
from visionloom.common.errors import UserError
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.plan.mixture import key_of
from visionloom.data.shards.sample import SampleError
from visionloom.data.stream.prompt_stream import AskedPrompt, PromptStream
from visionloom.parallel.topology import Topology
from visionloom.train.checkpoint.write import first_fault
from visionloom.train.generation.generator import Answer
from visionloom.train.generation.predictions import answer_text, question_text
from visionloom.train.generation.sampling import Sampling
from visionloom.train.reinforcement.config import ReinforcementConfig, RolloutConfig
from visionloom.train.reinforcement.groups import Group, WrittenAnswer
from visionloom.train.reinforcement.store import PassRate, PromptName, RolloutStore
from visionloom.train.rewards.groups import GroupRules
from visionloom.train.rewards.judge import Judge, rewards_of
from visionloom.train.rewards.rewards import Judged, unusable_reference

UNUSABLE: Final = "unusable"
"""Why a draw brought no group: the sample is no prompt."""
JUDGING: Final = "judging"
"""Part of a rollout, for signs of life."""


class RolloutEngine(Protocol):
    """What writes answers: the model in place, or a server that has its weights."""

    topology: Topology
    """Whose data ranks share the prompts."""

    def generate(self, prompts: Iterator[EncodedSample], sampling: Sampling) -> list[list[Answer]]:
        """Return the answers to this data rank's prompts, in their order; all ranks call it as often."""


@dataclass(frozen=True)
class Rollout:
    """What one or several optimizer steps train on."""

    number: int
    """In the phase, from 0."""
    wanted: int
    """Groups to train on."""
    groups: list[Group]
    """All that were written, in the order of their draws."""

    @property
    def useful(self) -> list[Group]:
        """Return the groups that there is something to learn from."""
        return [group for group in self.groups if not group.left_out]

    @property
    def taught(self) -> list[Group]:
        """Return the groups that are trained on: what replaces groups that teach nothing may be more than is lacking."""
        return self.useful[: self.wanted]

    @property
    def written(self) -> list[Group]:
        """Return the groups that have answers."""
        return [group for group in self.groups if group.answers]


def prompts_to_ask(groups: Sequence[Group], options: RolloutConfig) -> int:
    """Return how many prompts a rollout has asked when it is next known whether groups are lacking; as many as there are: none are.

    As many replace the lacking ones as should bring them, by the share of useful groups until then. Waves of just as many as are
    lacking would halve six times where half the prompts teach nothing, and each wave takes as long as its longest answer. Depends
    on the groups alone: so the same prompts are asked whatever the number of ranks, and after a restart.
    """
    most = int(options.batch_prompts * options.most_prompts)
    asked = options.batch_prompts
    while asked <= len(groups):
        useful = sum(not group.left_out for group in groups[:asked])
        lacking = options.batch_prompts - useful
        if lacking <= 0 or asked == most:
            break
        asked = min(most, asked + math.ceil(lacking * asked / max(1, useful)))
    return asked


class RolloutWriter:
    """Writes the rollouts of a phase; all ranks have one."""

    def __init__(
        self,
        options: ReinforcementConfig,
        phase_name: str,
        stream: PromptStream,
        store: RolloutStore,
        engine: RolloutEngine,
        seed: int,
    ) -> None:
        """Write with an engine into a store.

        Args:
            options: of the phase.
            phase_name: its name.
            stream: of the prompts.
            store: where groups are written, on the main rank.
            engine: what answers.
            seed: of all draws.

        Raises:
            UserError: on all ranks, if a reward cannot be used.
        """
        self.options, self.phase_name, self.stream = options, phase_name, stream
        self.store, self.engine, self.seed = store, engine, seed
        self.topology = engine.topology
        self.rules = GroupRules(options.most_right, options.right)
        self.rates: dict[PromptName, PassRate] = {}
        """Of each prompt, in the last rollout that had it."""
        self._rows: list[PassRate] = []
        self.judge = self._open_judge()

    def _open_judge(self) -> Judge | None:
        """Return the judge of a rank that gives results; its fault is raised on all."""
        judge, fault = None, ""
        # One of the ranks that have the same answers: a user's function may be costly.
        if self.topology.is_data_leader:
            try:
                options = self.options
                judge = Judge(
                    options.reward, options.functions, options.reward_seconds, options.judged_by
                )
            except UserError as error:
                fault = f"phases.{self.phase_name}.rl.{error}"
        if fault := first_fault(fault):
            raise UserError(fault)
        return judge

    def begin(self, rollout: int) -> None:
        """Take over the pass rates of the rollouts before this one, with which the phase begins or continues."""
        self._rows = self.topology.on_main(lambda: self.store.pass_rates(rollout))
        self.rates = {(row.dataset, row.key): row for row in self._rows}

    def write(self, number: int, policy_step: int) -> Iterator[Rollout]:
        """Write a rollout, or the rest of it, and yield it after each round; the last one is whole.

        Args:
            number: of the rollout in the phase.
            policy_step: optimizer steps that the policy has made in the run.

        Raises:
            UserError: if the store cannot be written or is damaged, or no prompt is left.
        """
        groups: list[Group] = self.topology.on_main(lambda: self.store.read(number, policy_step))
        first_draw = self.topology.on_main(lambda: self.store.first_draw(number))
        self.stream.cursor = max(self.stream.cursor, first_draw)
        rollout = Rollout(number, self.options.rollout.batch_prompts, groups)
        yield rollout
        while (lacking := prompts_to_ask(groups, self.options.rollout) - len(groups)) > 0:
            share = self.topology.data_size * self.options.rollout.part_prompts
            draws = self._next_draws(groups, min(lacking, share))
            new = self._round(draws, number, policy_step)
            add = partial(self.store.add, number, policy_step, new)
            self.topology.on_main(add)
            groups += new
            yield rollout

    def finish(self, rollout: Rollout) -> None:
        """Note a whole rollout: the next begins behind it, and the table of pass rates has it."""
        self.stream.cursor = max(group.draw for group in rollout.groups) + 1
        right = self.options.right
        for group in rollout.written:
            row = PassRate(rollout.number, group.dataset, group.key, group.pass_rate(right))
            self._rows.append(row)
            self.rates[row.dataset, row.key] = row
        self.topology.on_main(lambda: self.store.write_pass_rates(self._rows))

    def _next_draws(self, groups: Sequence[Group], count: int) -> list[int]:
        """Return the next draws, without those of prompts that were too easy the last time.

        Raises:
            UserError: if there are none in as many draws as there are samples.
        """
        draw = max((group.draw + 1 for group in groups), default=self.stream.cursor)
        patience = sum(len(dataset.shards) for dataset in self.stream.datasets)
        draws: list[int] = []
        # As many looks as there are samples: a mixture may repeat some and never come to others.
        while len(draws) < count and patience:
            place, _ = self.stream.place(draw)
            if self._is_easy(place):
                patience -= 1
            else:
                draws.append(draw)
            draw += 1
        if not draws:
            here, most = f"phases.{self.phase_name}", self.options.most_right
            raise UserError(
                f"{here}: more than {most:.0%} of the answers to every prompt were right, so nothing is left to learn: train fewer"
                f" steps, add harder prompts, or raise {here}.rl.most_right"
            )
        return draws

    def _is_easy(self, place: tuple[int, int, int]) -> bool:
        name = self.stream.datasets[place[0]].name
        row = self.rates.get((name, self.stream.key(place)))
        return row is not None and row.pass_rate > self.options.most_right

    def _round(self, draws: Sequence[int], number: int, policy_step: int) -> list[Group]:
        """Answer the prompts of some draws, shared by the data ranks; returns their groups on all ranks."""
        topology, own = self.topology, list[Group]()
        # Neighbours: a rank's prompts are then read together.
        each = -(-len(draws) // topology.data_size)
        mine = draws[topology.data_rank * each :][:each]
        prompts: list[tuple[int, AskedPrompt]] = []
        answers = self.engine.generate(
            self._prompts(mine, policy_step, prompts, own), self._sampling(number)
        )
        for place in range(each):
            if self.judge is not None and place < len(prompts):
                own.append(self._judged(self.judge, *prompts[place], answers[place], policy_step))
            # A reward of the user's may take long: others would wait for all of them longer than a collective may take.
            with pulse.current.at(JUDGING):
                topology.barrier()
        of_ranks: list[Any] = [None] * topology.world_size
        # Of the ranks of a copy of the model one speaks.
        dist.all_gather_object(of_ranks, own if topology.is_data_leader else [])
        return sorted((group for some in of_ranks for group in some), key=lambda each: each.draw)

    def _prompts(
        self,
        draws: Sequence[int],
        policy_step: int,
        prompts: list[tuple[int, AskedPrompt]],
        unusable: list[Group],
    ) -> Iterator[EncodedSample]:
        """Yield the prompts of some draws, and put them into `prompts`, without pictures; others become groups without answers."""
        most = self.stream.options.longest_sample - self.options.rollout.max_new_tokens
        for draw in draws:
            place, fault = self.stream.place(draw)
            prompt = None
            if not fault:
                try:
                    prompt = self.stream.prompt(place, most)
                    self._check_reference(prompt)
                except SampleError as error:
                    fault = f"{error.where} {error.problem}".strip()
            fault = self._agreed(fault)
            if prompt is not None and not fault:
                encoded = prompt.encoded
                # Answers to a prompt that comes again in a rollout are drawn anew.
                yield replace(encoded, sample_id=f"{encoded.sample_id} draw {draw}")
                # Answers come last: until then pictures would fill the host's memory.
                prompts.append((draw, prompt.without_patches()))
                continue

            name, key = self.stream.datasets[place[0]].name, self.stream.key(place)
            unusable.append(
                Group(
                    draw=draw,
                    policy_step=policy_step,
                    dataset=name,
                    key=key,
                    task="",
                    place=place,
                    prompt_tokens=0,
                    patches=0,
                    patch_pairs=0,
                    question="",
                    reference="",
                    answers=[],
                    left_out=f"{UNUSABLE}: {fault}",
                )
            )

    def _agreed(self, fault: str) -> str:
        """Return the first fault of a prompt on any rank that answers it together with this one: storage may fail for one alone."""
        hosts = self.topology.pack_hosts
        return fault if hosts is None else first_fault(fault, hosts)

    def _check_reference(self, prompt: AskedPrompt) -> None:
        """Raise SampleError where a reward cannot judge by the reference: all answers would be wrong, time and again."""
        encoded, options = prompt.encoded, self.options
        for name in rewards_of(options.reward, options.judged_by, encoded.dataset):
            if name in options.functions:
                continue
            if fault := unusable_reference(name, prompt.reference):
                raise SampleError(encoded.sample_id, "", f"{fault}, which reward {name} judges by")

    def _sampling(self, number: int) -> Sampling:
        """Return how the answers of a rollout are drawn: by seed, phase and rollout, and in it by prompt, answer and place."""
        options, tokenizer = self.options.rollout, self.stream.tokenizer
        return Sampling(
            options.max_new_tokens,
            tuple(tokenizer.stop_ids),
            options.temperature,
            top_p=options.top_p,
            answers=options.n,
            seed=int(key_of(self.seed, f"rollout {number} of {self.phase_name}")),
        )

    def _judged(
        self,
        judge: Judge,
        draw: int,
        prompt: AskedPrompt,
        answers: Sequence[Answer],
        policy_step: int,
    ) -> Group:
        """Return the group of a prompt and its answers."""
        tokenizer, encoded = self.stream.tokenizer, prompt.encoded
        question = question_text(encoded, tokenizer)
        written = []
        for answer in answers:
            # A reward of the user's may take long: each is a sign of life.
            with pulse.current.at(JUDGING):
                text = answer_text(answer.token_ids, tokenizer)
                limit = self.options.rollout.max_new_tokens
                judged = Judged(text, prompt.reference, question, len(answer.token_ids), limit)
                judgement = judge.judge(judged, encoded.dataset)
            written.append(
                WrittenAnswer(
                    answer.token_ids,
                    answer.log_probabilities,
                    answer.sampling_log_probabilities,
                    answer.is_stopped,
                    text,
                    judgement.rewards,
                    judgement.faults,
                    judge.total(judgement.rewards),
                )
            )
        return Group(
            draw=draw,
            policy_step=policy_step,
            dataset=encoded.dataset,
            key=self.stream.key(prompt.size.place),
            task=encoded.task or "",
            place=prompt.size.place,
            prompt_tokens=prompt.size.tokens,
            patches=prompt.size.patches,
            patch_pairs=prompt.size.patch_pairs,
            question=question,
            reference=prompt.reference,
            answers=written,
            # Without rewards a teacher judges: there is something to learn from any answer.
            left_out=self.rules.fault([each.total for each in written]) if judge.weights else "",
        )
