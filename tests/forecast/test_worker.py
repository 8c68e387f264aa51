"""The module that the server of workers imports first."""

import signal

from visionloom.tests.launch.guarding.test_exit import run_command


def test_ctrl_c_ends_it_without_a_traceback_while_torch_is_imported() -> None:
    code = (
        "import os, signal, sys, types\n"
        "sys.modules['visionloom.forecast.imagine'] = types.ModuleType('imagine')\n"
        "import visionloom.forecast.worker\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = run_command("-c", code, PYTHONPATH=".link")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
