"""Packages of Debian that some tests need."""

import os
import subprocess

import pytest


def install(purpose: str, *packages: str) -> None:
    """Install packages, or fail the test with one line."""
    options = ("-y", "-qq", "--no-install-recommends")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        for command in (["update", "-qq"], ["install", *options, *packages]):
            subprocess.run(
                ["apt-get", *command], check=True, capture_output=True, timeout=300, env=quiet
            )
    except (OSError, subprocess.SubprocessError):
        pytest.fail(
            f"these tests need {purpose}: apt-get install {' '.join(packages)}", pytrace=False
        )
