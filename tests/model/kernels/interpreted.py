"""Run in a process of its own, with TRITON_INTERPRET=1: each Triton kernel against its plain twin, one line of JSON."""

import importlib
import json

import torch

from visionloom.model.kernels import norm_triton, rotary_triton
from visionloom.tests.model.kernels.cases import calls, error


def main() -> None:
    # Few programs, so that each has several rows or tokens.
    norm_triton.MULTIPROCESSORS = 1
    rotary_triton.PROGRAMS = 2
    errors = {}
    for name, module, operation, arguments in calls():
        triton_code = importlib.import_module(f"visionloom.model.kernels.{module}_triton")
        importlib.import_module(f"visionloom.model.kernels.{module}")
        twin = getattr(torch.ops.visionloom, operation)
        errors[name] = error(getattr(triton_code, operation)(*arguments), twin(*arguments))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
