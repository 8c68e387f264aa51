"""Submitting a run: what is refused, what is written, and what the script does when the run has ended.

References: bash itself reads the scripts; programs of SLURM are stand-ins that write down how they were called. A real SLURM is in
test_slurm.py.
"""

import os
import re
import signal
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from visionloom.common.errors import UserError
from visionloom.launch.submit import run
from visionloom.launch.submitting import jobs, script
from visionloom.launch.submitting.words import read_order
from visionloom.tests.launch.guarding.test_claim import ROOT
from visionloom.train.observe.status import Status, write_status

WORDS = ["+recipe=demo", "nodes=2", "gpus_per_node=1"]
SBATCH = """echo "$*" >> "$CALLS/sbatch"; wc -l < "$CALLS/sbatch" """
SCONTROL = """
if [ "$1" = show ]; then echo "JobId=7 PreemptTime=${PREEMPTED:-None} Partition=low"; exit; fi
echo "$*" >> "$CALLS/scontrol"
kill -KILL $PPID  # as SLURM ends the script of a job that it requeues
"""
SRUN = """
echo $$ > "$CALLS/step"
printf '%s\\n' "$@" > "$CALLS/srun"
for ((i = 0; i < 200; i++)); do [ -z "$WAITS" ] || [ -e "$RUN/stop" ] || sleep 0.1; done
[ -z "$STATUS" ] || cp "$STATUS" "$RUN/status.json"
exit "${RC:-0}"
"""


@pytest.fixture(autouse=True)
def no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's data is not needed here, nor a plan."""
    monkeypatch.setattr(jobs, "check_paths", lambda _: None)
    monkeypatch.setattr(jobs, "check_agreements", lambda _: None)
    monkeypatch.setattr(jobs, "fitting_plan", lambda *_: {"phases": []})


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-ins for SLURM's programs write down how they were called."""
    programs = {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN, "scancel": "exit 0"}
    for name, text in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path))
    return tmp_path


def dry(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run([*WORDS, "--dry-run", *words]) == 0
    return capsys.readouterr().out


MISTAKES = {
    "nodes is missing": (["+recipe=demo"], 0),
    "nodes=two is not a whole number": (["nodes=two"], 0),
    "nodes.align=0 is not a whole number": (["--chain", "nodes.align=0"], 0),
    "nodes.PHASE=N is for --chain": (["nodes.align=2"], 0),
    "nodes=algin is unknown (did you mean align?)": (["--chain", "nodes.algin=2"], 0),
    "write both, --array seeds=0,1,2, or neither": (["seeds=1"], 0),
    "seeds=1;2: write whole numbers": (["--array", "seeds=1;2"], 0),
    "global_batch=": (["gpus_per_node=3"], 0),
    "no such key: partiton (did you mean partition?)": (["partiton=low"], 0),
    "account=a\\n#SBATCH -p x has signs": (["account=a\n#SBATCH -p x"], 0),
    "gpu=h1000: use one of": (["gpu=h1000"], 0),
    "template=nowhere.sh cannot be read": (["template=nowhere.sh"], 0),
    "--torchrun prints the command of one run": (["--torchrun", "--chain"], 0),
    "warn=1 must be at least 10": (["warn=1"], 0),
    "program=a 'b has no closing quotation": (["program=a 'b"], 0),
    "program is empty": (["program= "], 0),
    "sbatch=--comment='x has no closing": (["sbatch=--comment='x"], 0),
    "time=5 is not above warn=300": (["time=5"], 0),
    "time=4:59 is not above": (["time=4:59"], 0),
    "time=0-0:05 is not above": (["time=0-0:05"], 0),
    "time=0:05:00 is not above": (["time=0:05:00"], 0),
    "plan=no is not true or false": (["plan=no"], 0),
    "run.phase=no is unknown": (["run.phase=no"], 0),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_is_one_line(said: str) -> None:
    words, _ = MISTAKES[said]
    base = [] if said == "nodes is missing" else WORDS
    with pytest.raises(UserError) as error:
        run([*base, *words, "--dry-run"])
    assert any(said in line for line in error.value.lines), error.value.lines


def test_a_template_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.sh"
    mine.write_text("#!/bin/bash\n# {{nodes}} of mine\nRUN={{run}}\n{{command}}\n")
    assert "# 2 of mine\nRUN=runs/demo\n" in dry(capsys, f"template={mine}")
    mine.write_text("RUN={{run}} {{comand}}\n")
    with pytest.raises(UserError, match=r"has \{\{comand\}\}, which nothing fills in"):
        run([*WORDS, f"template={mine}"])
    mine.write_text("{{command}}\n")
    with pytest.raises(UserError, match=r"lacks \{\{run\}\}"):
        run([*WORDS, f"template={mine}"])


def test_bash_reads_the_words_that_were_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Spaces, quotes and dollars in words and paths."""
    odd = ["run.folder=runs/it's a $HOME", "+data.datasets.mine.path=/d/a b,`c`", "run.seed=3"]
    text = dry(capsys, *odd)
    begin, end = text.index("RUN="), text.index("JOB=")
    shown = f'{text[begin:end]}\nprintf "%s\\n" "$RUN" "${{TRAIN[@]}}"'
    lines = subprocess.check_output(["bash", "-c", shown], text=True).splitlines()
    assert lines == [
        "runs/it's a $HOME",
        str(ROOT.resolve() / "launch/pretrain.py"),
        "+recipe=demo",
        *odd,
    ]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_options_of_the_scheduler(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "setup.sh").write_text("module load cuda\n")
    own = ["time=2-00:00:00", "partition=gpu", "account=lab", "cpus_per_task=64", "warn=120"]
    text = dry(capsys, *own, "sbatch=--qos=long '--comment=a b'", f"setup={tmp_path}/setup.sh")
    lines = set(text.splitlines())
    assert {
        "#SBATCH --time=2-00:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
    } <= lines
    assert {"#SBATCH --cpus-per-task=64", "#SBATCH --qos=long", "module load cuda"} <= lines
    assert {"#SBATCH --signal=B:USR1@120", "#SBATCH --requeue", "#SBATCH '--comment=a b'"} <= lines
    assert 'bash -c "$AGENT" python ' in text, "setup brings its own"


def test_containers(capsys: pytest.CaptureFixture[str]) -> None:
    here = Path.cwd()
    text = dry(capsys, "container=nvcr.io#a/b:1", "mounts=/data")
    pairs = f"{here}:{here},{here}/runs:{here}/runs,/data:/data"
    assert (
        f"--container-image='nvcr.io#a/b:1' --container-mounts={pairs} --container-workdir={here})"
        in text
    )
    text = dry(capsys, "container=image.sif", "mounts=/data")
    assert (
        f"apptainer exec --nv --pwd {here} --bind {here},{here}/runs,/data image.sif bash" in text
    )


def test_a_container_sees_the_code_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = ROOT.resolve()
    text = dry(capsys, "container=nvcr.io#a/b:1")
    assert f",{code}:{code}" in text and f"--container-workdir={tmp_path})" in text
    assert f"TRAIN=({code}/launch/pretrain.py " in text


def test_a_chain_of_which_sbatch_refuses_a_job(
    calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = f'#!/bin/bash\ncase "$*" in *afterok:2*) exit 1;; esac\n{SBATCH}\n'
    (calls / "bin" / "sbatch").write_text(sbatch)
    words = [*WORDS, "run.phases=[align,multimodal,long]", "--chain"]
    with pytest.raises(UserError) as error:
        run([*words, f"run.folder={calls / 'refused'}"])
    assert error.value.lines[1:] == ["the jobs before it are in the queue; end them: scancel 1 2"]
    (calls / "bin" / "sbatch").write_text(f"#!/bin/bash\n{SBATCH}\n")
    capsys.readouterr()
    assert run([*words, f"run.folder={calls / 'run'}"]) == 0
    assert "end it: scancel 3 4 5;" in capsys.readouterr().out


def test_what_a_submission_leaves(calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = calls / "run"
    assert run([*WORDS, f"run.folder={folder}"]) == 0
    said = capsys.readouterr().out
    (place,) = (folder / "submit").iterdir()
    assert sorted(each.name for each in place.iterdir()) == ["demo.sh", "demo.yaml", "git.txt"]
    assert (calls / "sbatch").read_text() == f"--parsable {place}/demo.sh\n"
    assert said.startswith("job 1: demo on 2 x 1") and f"touch {folder}/stop" in said
    (job,) = jobs.checked_jobs(read_order([*WORDS, f"run.folder={folder}"]))
    assert yaml.safe_load((place / "demo.yaml").read_text()) == asdict(job.config)
    head = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True)
    assert f"commit {head}" in (place / "git.txt").read_text()


def test_sbatch_that_refuses_or_is_not_there(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (calls / "bin" / "sbatch").write_text(
        "#!/bin/bash\necho 'sbatch: error: no such account' >&2; exit 1\n"
    )
    with pytest.raises(UserError, match=r"sbatch refuses .*demo\.sh: no such account"):
        run([*WORDS, f"run.folder={calls / 'refused'}"])
    monkeypatch.setenv("PATH", str(calls))
    with pytest.raises(
        UserError, match="sbatch is not found: submit from a machine of the cluster"
    ):
        run([*WORDS, f"run.folder={calls / 'absent'}"])


def test_a_chain_checks_and_plans_each_phase(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = []

    def plan(words: list[str], option: str) -> dict[str, Any]:
        assert option == "plan"
        planned.append([word for word in words if word.startswith(("world=", "phase="))])
        return {"phases": []}

    monkeypatch.setattr(jobs, "fitting_plan", plan)
    phases = "run.phases=[align,multimodal,long]"
    more = "phases.long.global_batch=4"
    assert (
        run([*WORDS, phases, more, "--chain", "nodes.long=4", f"run.folder={calls / 'run'}"]) == 0
    )
    assert planned == [
        ["world=2", "phase=align"],
        ["world=2", "phase=multimodal"],
        ["world=4", "phase=long"],
    ]
    first, second, third = (calls / "sbatch").read_text().splitlines()
    assert "--dependency" not in first
    assert second.startswith("--parsable --dependency=afterok:1 --kill-on-invalid-dep=yes ")
    assert third.startswith("--parsable --dependency=afterok:2 ") and third.endswith("demo-long.sh")
    text = Path(third.split()[-1]).read_text()
    assert "#SBATCH --nodes=4\n" in text and "run.phase=long)" in text


def test_an_array_has_a_run_for_each_seed(calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = dry(capsys, "--array", "seeds=3,5,8", "run.folder=runs/a b")
    assert "#SBATCH --array=0-2\n" in text
    begin, end = text.index("SEEDS="), text.index("# ---- The environment")
    shown = f'{text[begin:end]}\nprintf "%s\\n" "$RUN" "$JOB" "${{TRAIN[@]}}"'
    variables = os.environ | {
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_JOB_ID": "9",
    }
    lines = subprocess.check_output(["bash", "-c", shown], text=True, env=variables).splitlines()
    assert lines[:2] == ["runs/a b-seed5", "7_1"]
    assert lines[-3:] == ["run.seed=5", "run.name=demo-seed5", "run.folder=runs/a b-seed5"]


STOPPED, BETWEEN = "stopped by /runs/demo/stop after step 4, which is saved", "stopped by SIGTERM"
State = Literal["running", "done", "failed", "stopped"]


def status(
    state: State, code: int | None, cause: str = 'a cause, "quoted"', start: str = "7-0/1234/0"
) -> Status:
    """By default of the first start of job 7."""
    return Status(state, code, cause, 0, 4, "a hint", start=start)


ENDS: dict[str, tuple[Status | None, dict[str, str], int, int | None]] = {
    # the run's status, how it came about, a signal to the script, its exit code (None: it is requeued)
    "done": (status("done", 0), {}, 0, 0),
    "a wrong word": (status("failed", 2), {"RC": "1"}, 0, 2),
    "no progress": (status("failed", 93), {"RC": "1"}, 0, 93),
    "row 8, the limit": (status("stopped", 75, STOPPED), {"WAITS": "1"}, signal.SIGUSR1, None),
    "row 9, told by SIGTERM": (
        status("stopped", 75),
        {"PREEMPTED": "2026-11-27T10:00:00"},
        0,
        None,
    ),
    "row 10, scancel": (status("stopped", 75), {"WAITS": "1"}, signal.SIGTERM, 1),
    "stopped by hand": (status("stopped", 75, STOPPED), {}, 0, 75),
    "stopped by hand, no restarts": (status("stopped", 75, STOPPED), {"RC": "1"}, 0, 75),
    "stopped by hand between phases": (status("stopped", 75, BETWEEN), {}, 0, 75),
    "row 11, between phases": (status("stopped", 75, BETWEEN), {"RC": "1"}, 0, None),
    "a hang": (status("failed", 75), {"RC": "1"}, 0, None),
    "a crash": (status("failed", 1), {"RC": "1"}, 0, None),
    "row 11, killed without a word": (status("running", None), {"RC": "137"}, 0, None),
    "never begun": (None, {"RC": "127"}, 0, 1),
    "refused, another run is in the folder": (
        status("running", None, start="5-1/1234/0"),
        {"RC": "1"},
        0,
        1,
    ),
}


def end_of_job(calls: Path, variables: dict[str, str], number: int) -> tuple[int, str]:
    """Run job.sh as SLURM does, with a signal to it when its step has begun; returns its exit code and what it says."""
    with subprocess.Popen(
        ["bash", "job.sh"], cwd=calls, env=variables, stdout=subprocess.PIPE, text=True
    ) as job:
        if number:
            while not (calls / "step").exists():
                time.sleep(0.01)
            job.send_signal(number)
        said, _ = job.communicate(timeout=60)
    return job.returncode, said


@pytest.mark.parametrize("end", ENDS)
def test_what_comes_after_the_run(
    end: str, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after, how, number, code = ENDS[end]
    folder = calls / "run"
    folder.mkdir()
    write_status(folder, status("stopped", 75, "of the start before", "6-0/1234/0"))
    variables = os.environ | {"SLURM_JOB_ID": "7", "RUN": str(folder), "STATUS": "", **how}
    if after is not None:
        write_status(calls, after)
        variables["STATUS"] = str(calls / "status.json")
    (calls / "job.sh").write_text(dry(capsys, f"run.folder={folder}"))
    ended, said = end_of_job(calls, variables, number)
    requeued = (calls / "scontrol").exists()
    assert (None if requeued else ended) == code, said
    assert not requeued or (calls / "scontrol").read_text() == "requeue 7\n"
    assert said.strip().count("\n") == 0 and "job 7: " in said
    assert not (folder / "stop").exists()
    assert (calls / "srun").read_text().splitlines()[-1] == f"run.folder={folder}"


def test_the_agent_of_a_node(calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Python whose path has a space and a quote; the words of the run come to torchrun as they were written."""
    python = calls / "it's a" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$CALLS/agent"\n')
    python.chmod(0o755)
    (calls / "bin" / "srun").write_text(
        '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done; exec "$@"\n'
    )
    own = [f"python={python}", f"run.folder={calls / 'a b'}"]
    (calls / "job.sh").write_text(dry(capsys, *own))
    variables = {"SLURM_JOB_ID": "7", "SLURM_NODEID": "1", "SLURM_NNODES": "2"}
    end_of_job(calls, os.environ | variables, 0)
    _, module, *options = (calls / "agent").read_text().splitlines()
    assert module == "torch.distributed.run" and "--rdzv-id=7-0" in options
    assert options[-2:] == ["+recipe=demo", own[1]]
    assert run([*WORDS, "--torchrun", *own]) == 0
    subprocess.run(["bash", "-c", capsys.readouterr().out], check=True)
    assert (calls / "agent").read_text().splitlines()[-1] == own[1]


def test_a_save_has_nearly_all_of_the_warning(
    calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What saves still after half of it is not killed by torchrun; at five sixths of it the step ends, and the job is requeued."""
    from torch.distributed.launcher.api import LaunchConfig

    write_status(calls, status("running", None))
    programs = {
        "sleep": "exec /bin/sleep 0.01",  # a second
        "scancel": 'echo "$*" > "$CALLS/scancel"; ls "$RUN" > "$CALLS/asked"',
        "srun": 'cp status.json "$RUN"; printenv TORCH_ELASTIC_SHUTDOWN_TIMEOUT > step; exec /bin/sleep 50',
    }
    for name, text in programs.items():
        (calls / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
    (calls / "bin" / "sleep").chmod(0o755)
    (calls / "run").mkdir()
    (calls / "job.sh").write_text(dry(capsys, f"run.folder={calls / 'run'}", "warn=60"))
    variables = os.environ | {"SLURM_JOB_ID": "7", "RUN": str(calls / "run")}
    _, said = end_of_job(calls, variables, signal.SIGUSR1)
    assert (calls / "scontrol").exists(), said
    assert "--signal=TERM 7" in (calls / "scancel").read_text()
    assert "stop" in (calls / "asked").read_text().split()
    seconds = (calls / "step").read_text().strip()
    assert seconds == "60"
    # Reference: what torchrun of the installed torch makes of the variable.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)
        assert LaunchConfig(1, 1, 1).shutdown_timeout == 60


def test_without_slurm_one_command_for_all_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*WORDS, "--torchrun", "host=10.0.0.1", "port=29600", "restarts=0"]) == 0
    line = capsys.readouterr().out
    assert re.search(
        r"--nnodes=2 --nproc-per-node=1 .*--rdzv-endpoint=10\.0\.0\.1:29600 \S+pretrain", line
    )


def test_the_template_says_what_it_sets() -> None:
    """Each variable of NCCL and torch has its reason in the line before."""
    lines = (Path(script.__file__).with_name("slurm.sh")).read_text().splitlines()
    names = [
        number for number, line in enumerate(lines) if re.match(r"export (NCCL|TORCH|OMP)_", line)
    ]
    assert len(names) == 5 and all(lines[number - 1].startswith("# ") for number in names)
