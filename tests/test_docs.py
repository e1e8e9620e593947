"""What the documentation shows runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "docs" / "own_loop.py"


@pytest.mark.parametrize("ranks", [1, 2])
def test_own_loop(ranks: int, tmp_path: Path) -> None:
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parents[1])}
    done = subprocess.run(
        [sys.executable, *starter, str(EXAMPLE)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name in ("large", "small"):
        losses = [float(x) for x in re.findall(rf"step \d {name}: loss ([\d.]+)", done.stdout)]
        assert len(losses) == 5
        assert (tmp_path / "outputs" / name / "step-5" / "manifest.json").exists()
    assert len(EXAMPLE.read_text().splitlines()) <= 40
