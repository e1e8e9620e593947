"""The peak of memory is this process's own."""

import subprocess
import sys

import torch

from titan_core.runtime.host_memory import peak_resident_bytes


def test_peak_is_not_that_of_who_started_the_process() -> None:
    held = torch.ones(300 << 18)  # 300 MiB
    before = peak_resident_bytes()
    assert before > held.nbytes
    code = "from titan_core.runtime.host_memory import peak_resident_bytes; print(peak_resident_bytes())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 150 << 20
