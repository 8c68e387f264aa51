# make demo   a tiny Qwen3-VL through every phase, on two CPU processes
# make test   lint, types, import directions and the test suite
# make proofs longer proofs: every layout of the parallel axes against one process, as a table, killed ranks, four ranks, whole
#             commands under torchrun, exports in transformers 4.57 (which the test installs into .venv/transformers-4.57)
# make parity that table alone, without teachers and adapters
# make faults ranks killed at random moments, broken disks, hangs; a table of all faults and their tests at its end
# make disk   an optimizer and weights on a fast disk: DeepSpeed compiles its code for it first, five minutes of a core
# make bench-data  the data system's goals in one table, beside the peers (QUICK=1: rough figures)
# make plans  every shipped recipe planned on the GPUs that its header states, into docs/plans.md; fails where one does not fit
# make lint   only the checks that run no test
# Each makes .venv and installs on its first run.

SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/.link$(if $(PYTHONPATH),:$(PYTHONPATH))
# Images of containers set it to stay small. Here hundreds of processes start, and each would compile torch and Megatron-core anew.
unexport PYTHONDONTWRITEBYTECODE
DEMO_DATA := runs/demo-data

.PHONY: demo test proofs parity faults disk plans bench-data lint format install
.DEFAULT_GOAL := test

install: .venv/installed

.venv/installed: setup.py pyproject.toml constraints.txt .ci/setup-venv
	@bash .ci/setup-venv

demo: .venv/installed
	@python launch/data.py demo $(DEMO_DATA)
	@OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 launch/pretrain.py +recipe=demo

lint: .venv/installed
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo

# A file of tests stays together: its fixtures are made once. Two processes, each with a pool of ranks of its own.
test: lint
	pytest -n 2 --dist loadfile

# With the layouts of make parity, which alone would leave a core idle while their ranks wait for each other.
proofs: .venv/installed
	pytest -m "long or parity" -n 2 --dist loadfile

parity: .venv/installed
	pytest -m "not long" tests/train/test_parity.py

faults: .venv/installed
	pytest -m faults -n 2 --dist loadfile

disk: .venv/installed
	pytest -m disk tests/train/engines/test_nvme.py

plans: .venv/installed
	@OMP_NUM_THREADS=1 python launch/plan.py table docs/plans.md

.venv/bench: .venv/installed
	@python -m uv pip install --quiet --python .venv/bin/python -e '.[dev,demo,bench]' -c constraints.txt || \
		python -m pip install --quiet -e '.[dev,demo,bench]' -c constraints.txt
	@touch $@

bench-data: .venv/bench
	@OMP_NUM_THREADS=1 python benchmarks/data/suite.py $(if $(QUICK),--quick)

format: .venv/installed
	ruff check --fix .
	ruff format .
