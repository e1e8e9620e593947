"""The tests of `launched/`, in a process in which Triton interprets kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCHED = Path(__file__).parent / "launched"


@pytest.mark.parametrize("path", sorted(LAUNCHED.glob("test_*.py")), ids=lambda path: path.stem)
def test_kernels_match_their_references_in_the_interpreter(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
