"""The Triton back end without a GPU: in its interpreter, and what its launchers count."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import profile
from fpdarts import kernels

pytest.importorskip("triton", reason="triton is not installed")


def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    inner = Path(__file__).parent / "interpreted.py"
    result = subprocess.run([*command, str(inner)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says why it cannot run where there is no GPU")
def test_it_says_why_it_cannot_run_here():
    if "TRITON_INTERPRET" not in os.environ:
        with pytest.raises(kernels.BackendUnavailable, match="'triton' cannot run here: they are for NVIDIA GPUs"):
            kernels.backend("triton", "cpu")


def counted(**options):
    return profile.main(profile.Options("triton", dtype="bfloat16", **options))


def test_launches_and_bytes_of_a_step():
    both, drawn = counted(), counted(gates="step")
    step = both["weight_step"]
    assert step["forward"]["launches"] + step["backward"]["launches"] <= 560
    assert step["forward"]["bytes"] + step["backward"]["bytes"] <= 25e9
    # 4/3 of 2 paths are open on average; preprocessing and states cost the same
    assert 0.65 < drawn["weight_step"]["total"]["bytes"] / step["total"]["bytes"] < 0.85
    assert drawn["weight_step"]["total"]["launches"] == step["total"]["launches"]
    assert both["architecture_step"]["total"]["bytes"] < step["total"]["bytes"]
