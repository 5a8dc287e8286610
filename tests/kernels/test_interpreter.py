"""Runs this folder's tests once more with the kernels in Triton's interpreter.

Triton decides at import whether it interprets, so that needs a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lsync_compile.kernels.launch import INTERPRETED, triton


def obstacle() -> str:
    """Why the interpreter cannot run here; empty where it can."""
    if INTERPRETED:
        return "already under the interpreter"
    if triton is None:
        return "Triton is not installed"
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of Triton 3.6 cannot loop with NumPy 2.4 or later"
    return ""


@pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "none")
def test_the_tests_pass_with_interpreted_kernels():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    left_out = ("test_interpreter.py", "test_resources.py", "test_registry.py")
    command += [f"--ignore={folder / name}" for name in left_out]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    assert run.returncode == 0
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed.group(1)) > 100
