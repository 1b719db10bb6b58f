"""What the integrations do on two ranks, in one launch."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks_have_the_gradients_of_one():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [*torchrun, str(ROOT / "tests" / "integrations" / "ranks_integrations.py")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0 and done.stderr.count("agreed") == 2, done.stderr
