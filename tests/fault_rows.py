"""The 38 faults that a run must survive or name, each with the tests that prove it: `make faults` prints them as a table.

Tests called `test_row_NN_...` belong to row NN without standing here. Where each runs follows from its marks.
"""

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
BY_NAME = re.compile(r"test_row_(\d\d)_")


@dataclass(frozen=True)
class Row:
    """One fault."""

    number: int
    fault: str
    expected: str
    listed: tuple[str, ...] = ()
    """Tests as `file::function`, the file below tests/; all their cases count."""

    @property
    def tests(self) -> tuple[str, ...]:
        """All tests of the row."""
        named = (
            test
            for test in all_tests()
            if (match := BY_NAME.match(test.partition("::")[2])) and int(match[1]) == self.number
        )
        return *self.listed, *(test for test in named if test not in self.listed)


RUNS, ENDS = "train/test_faults.py::test_", "train/test_early_end.py::test_"
SAVES, READS = (
    "train/checkpoint/test_checkpoint.py::test_",
    "train/checkpoint/test_untrusted.py::test_",
)
WATCH, HANG = "launch/guarding/test_watch.py::test_", "launch/guarding/test_hang.py::test_"

SLURM = "launch/submitting/test_slurm.py::test_"
AFTER_SLURM = f"{SLURM}rows_08_09_11_end_as_if_nothing_had_happened"

ROWS = (
    Row(1, "SIGKILL of a rank that is not the first", "starts again in place, and ends with the same bits",
        (f"{RUNS}restarts_in_place_lose_nothing", f"{RUNS}restarts_say_what_was_killed",
         f"{RUNS}a_killed_rank_is_named_when_the_job_ends", f"{WATCH}the_end_of_a_rank_is_written_by_another",
         "train/test_resume.py::test_a_killed_rank_costs_nothing")),
    Row(2, "SIGKILL of rank 0", "the same",
        (f"{RUNS}restarts_in_place_lose_nothing", "train/test_resume.py::test_a_killed_rank_costs_nothing")),
    Row(3, "20 SIGKILLs at random moments, also inside saves", "each time a whole checkpoint is there to go on from",
        (f"{RUNS}every_attempt_goes_on_from_the_last_whole_checkpoint", f"{RUNS}nothing_is_lost_or_doubled",
         f"{RUNS}resuming_takes_the_newest_commit", f"{RUNS}the_weights_end_as_if_nothing_had_happened")),
    Row(4, "a kill between the write and the rename of a checkpoint", "the one before is used, the rest is swept",
        (f"{SAVES}a_commit_cut_short",)),
    Row(5, "SIGKILL of torchrun's agent", "no rank and no data worker outlives it",
        (f"{RUNS}a_killed_agent_takes_everything_with_it", "launch/guarding/test_exit.py::test_a_rank_ends_with_its_agent")),
    Row(6, "the whole job is killed, the same command comes again", "resumes; logs and trackers go on; the time is accounted for",
        (f"{RUNS}every_attempt_goes_on_from_the_last_whole_checkpoint",
         "train/test_honest_time.py::test_a_killed_run_counts_what_it_lost",
         "train/observe/test_trackers.py::test_wandb_offline_keeps_the_runs_id",
         "train/observe/test_trackers.py::test_tensorboard_receives_numbers_and_hides_steps_taken_again")),
    Row(7, "SIGTERM to one rank or to the agent", "all save after the same step, 75",
        (f"{ENDS}a_real_run_stops_and_goes_on", f"{ENDS}one_rank_is_asked_and_all_stop_together",
         "launch/guarding/test_signals.py::test_where_no_phase_trains_it_ends_at_once")),
    Row(8, "the scheduler warns before the time limit", "saves, ends with 75 and is queued again",
        (f"{ENDS}a_real_run_stops_and_goes_on", "launch/guarding/test_signals.py::test_a_wish_waits_for_the_end_of_a_step", AFTER_SLURM)),
    Row(9, "preempted by a job of a higher partition", "saves within the grace, is queued again and ends", (AFTER_SLURM,)),
    Row(10, "cancelled by its user", "stays cancelled"),
    Row(11, "a node is lost", "the job is queued again and goes on from the last checkpoint",
        (AFTER_SLURM,)),
    Row(12, "a crash loop", "three starts without a new checkpoint, then 93",
        (f"{ENDS}a_crash_loop_ends_after_three_starts", "train/test_bad_steps.py::test_nan_for_good_is_given_up")),
    Row(13, "SIGSTOP of a rank", "named with the stacks of all within limit + 5 s, 75",
        (f"{ENDS}a_stopped_rank_is_named_with_stacks", f"{HANG}the_rank_that_others_wait_for_is_named")),
    Row(14, "a rank that sleeps or holds Python's lock", "the same",
        (f"{HANG}the_rank_that_others_wait_for_is_named", f"{HANG}who_is_named")),
    Row(15, "a slow rank", "named with its part after 20 steps, the run goes on",
        (f"{ENDS}a_slow_rank_is_named", "train/observe/test_slow_ranks.py::test_it_is_told_once_in_twenty_steps")),
    Row(16, "an exception in one rank", "its traceback alone, and in torchrun's summary",
        ("launch/guarding/test_exit.py::test_torchruns_summary_shows_the_rank_that_failed_first",
         f"{WATCH}the_end_of_a_rank_is_written_by_another", f"{ENDS}a_crash_loop_ends_after_three_starts")),
    Row(17, "a segmentation fault", "named as SIGSEGV, with the place in the program",
        ("launch/guarding/test_claim.py::test_a_segmentation_fault_leaves_its_trace", f"{WATCH}the_end_of_a_rank_is_written_by_another")),
    Row(18, "out of memory: the kernel kills a rank, a GPU has no more", "named as such, with the memory that it held before",
        (f"{RUNS}a_rank_without_memory_is_named", f"{WATCH}want_of_memory_is_named",
         "launch/guarding/test_claim.py::test_consequences_and_memory_are_told_apart",
         "train/observe/test_step_profile.py::test_want_of_memory_leaves_a_snapshot")),
    Row(19, "the disk fills up while a checkpoint is written", "goes on or ends, old checkpoints whole, path and room told",
        (f"{RUNS}a_disk_that_fails_under_a_run", f"{SAVES}a_full_disk_leaves_what_was_saved",
         "train/observe/test_run_log.py::test_a_full_disk_leaves_no_half_line")),
    Row(20, "no room for one writer only", "the save has failed, for all", (f"{SAVES}one_rank_that_fails_fails_the_save",)),
    Row(21, "a read-only folder, or one that goes away", "refused before the data and torch; later: one line",
        (f"{RUNS}a_read_only_folder_is_refused_before_anything_is_loaded", f"{RUNS}a_disk_that_fails_under_a_run",
         "launch/guarding/test_claim.py::test_a_folder_that_cannot_be_written", f"{SAVES}a_folder_that_cannot_be_written_is_refused")),
    Row(22, "too little room for the first checkpoint", "refused before training, within 5 % of its size",
        (f"{SAVES}too_small_a_disk_is_refused_before_training", "launch/guarding/test_claim.py::test_a_folder_without_room")),
    Row(23, "a flipped bit in a checkpoint", "found, named and passed over",
        (f"{SAVES}damage_is_found_and_named", "train/test_resume.py::test_a_damaged_checkpoint_is_passed_over")),
    Row(24, "a short or missing file of a checkpoint", "the same; nothing is begun anew unasked",
        (f"{SAVES}damage_is_found_and_named", "train/test_lost.py::test_a_run_whose_checkpoints_are_all_damaged")),
    Row(25, "a checkpoint that would run code", "refused, nothing runs",
        (f"{SAVES}a_malicious_index_is_refused_without_being_run", f"{SAVES}a_malicious_entry_is_refused_without_being_run",
         f"{READS}a_pickle_makes_records_and_nothing_else", f"{READS}no_file_lies_there_unlisted")),
    Row(26, "another number of ranks", "the same samples in the same order, losses within 1e-6",
        ("train/test_resume.py::test_another_number_of_ranks_goes_on_alike",)),
    Row(27, "another layout", "weights and moments bit for bit",
        (f"{SAVES}any_layout_to_any_layout", f"{SAVES}another_layout_holds_the_same_moments",
         f"{SAVES}without_the_optimizers_state_it_is_found")),
    Row(28, "other data, tokenizer or settings", "refused with what differs, unless told to go on",
        ("train/test_changes.py::test_a_setting_that_changes_the_run", "train/test_changes.py::test_a_setting_that_cannot_change",
         "data/stream/test_train_stream.py::test_a_state_of_another_stream_is_refused")),
    Row(29, "a mistyped option, value or recipe", "one line from one rank, before torch",
        ("launch/test_bad_input.py::test_refused_before_torch",)),
    Row(30, "an optional package is missing", "works without, or names the extra to install",
        ("launch/test_extras.py::test_the_extra_is_named", "launch/test_extras.py::test_commands_start_without_any_of_them")),
    Row(31, "a damaged tar", "counted and named, never silent",
        ("data/shards/test_index.py::test_damage_is_one_line_with_file_and_offset",
         "data/shards/test_index.py::test_damage_after_indexing_is_never_silent",
         "data/stream/test_faults.py::test_exactly_the_planted_faults_are_written_down")),
    Row(32, "pictures that are cut, bombs, or hardly a picture", "left out, counted and named; memory stays bounded",
        ("data/shards/test_open_media.py::test_a_bomb_is_refused_from_its_header_and_the_largest_allowed_one_is_cheap",
         "data/shards/test_open_media.py::test_narrow_deep_and_cmyk_pictures",
         "data/shards/test_open_media.py::test_a_truncated_picture_is_an_error_and_never_gray_below",
         "data/stream/test_train_stream.py::test_too_many_unreadable_samples_stop_the_run")),
    Row(33, "paths and URLs that lead outside", "refused, nothing outside is opened and nothing runs",
        ("data/test_outside.py::test_references_lead_nowhere_outside",
         "data/test_outside.py::test_tar_members_that_are_no_files_or_lead_outside",
         "data/test_outside.py::test_urls_are_unchained_and_their_schemes_are_from_a_list")),
    Row(34, "NaN, infinity or a spike in loss or gradient", "skipped by all ranks alike, then gone back from, then 93",
        ("train/test_bad_steps.py::test_bad_data_is_passed_over", "train/test_bad_steps.py::test_nan_for_good_is_given_up",
         "train/test_bad_steps.py::test_a_gradient_a_million_times_too_large_gets_a_word",
         "train/test_bad_steps.py::test_spikes_are_skipped_if_asked_and_do_not_count")),
    Row(35, "wandb does not answer, TensorBoard's disk is full", "trains on, metrics.jsonl is whole",
        (f"{RUNS}wandb_that_does_not_answer", "train/observe/test_trackers.py::test_wandb_that_never_comes_back_holds_nothing_up",
         "train/observe/test_trackers.py::test_tensorboard_on_a_full_disk_is_one_warning")),
    Row(36, "slow storage", "one save at a time, training goes on, MB/s told"),
    Row(37, "a data worker is killed or stopped", "named with what it was at, no hang"),
    Row(38, "the port is in use, two runs in one folder", "refused, with the holder's host and process"),
)  # fmt: skip


@functools.cache
def all_tests() -> tuple[str, ...]:
    """Every test function below tests/, as `file::function`."""
    tests = []
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                tests.append(f"{path.relative_to(TESTS)}::{node.name}")
    return tuple(tests)


def name_of(nodeid: str) -> str:
    """The test of one of its cases, as pytest names it: `tests/a/test_b.py::test_c[case]`."""
    return nodeid.partition("[")[0].removeprefix("tests/")


def place_of(marks: set[str]) -> str:
    """The command that runs tests with these marks."""
    for mark, command in (("faults", "make faults"), ("long", "make proofs")):
        if mark in marks:
            return f"in {command}"
    return "in make test"


def write_table(
    reporter: pytest.TerminalReporter, outcomes: dict[str, set[str]], places: dict[str, str]
) -> None:
    """Write the rows with their tests.

    Args:
        reporter: of pytest.
        outcomes: of the cases of each test that was run: passed, failed, skipped.
        places: of each test that was collected, the command that runs it.
    """
    reporter.section("the faults that a run survives or names")
    for row in ROWS:
        reporter.write_line(f"{row.number:>2}  {row.fault}: {row.expected}")
        for test in row.tests:
            known = outcomes.get(test, set())
            said = next((each for each in ("failed", "passed", "skipped") if each in known), "")
            reporter.write_line(f"      {said or places.get(test, 'not collected'):<14} {test}")
