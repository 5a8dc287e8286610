"""Nothing asks another host for anything: neither when it is imported nor when it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[1] / "src" / "lsync_compile" / "assets" / "sample"

# Refuses every way of Python's to another host, and writes down who tried: a library may swallow
# the error. The variables with which users forbid the network are not set.
SCRIPT = """
import socket, sys, traceback

tried = []

def refuse(*args, **kwargs):
    tried.append("".join(traceback.format_stack(limit=6)))
    raise OSError("no network in this test")

def connect(self, address, plain=socket.socket.connect):
    return plain(self, address) if self.family == socket.AF_UNIX else refuse()

socket.socket.connect = socket.socket.connect_ex = connect
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = refuse

from lsync_compile.cli import app

sample, out = sys.argv[1:]
app(["doctor"], standalone_mode=False)
app(
    ["sync", sample + "/talking.mp4", sample + "/speech.wav", "-o", out, "--quiet"]
    + ["--max-frames", "4", "--num-frames", "4", "--steps", "1", "--no-compile"],
    standalone_mode=False,
)
try:
    app(["sync", sample + "/talking.mp4", "-o", out, "--checkpoint", "someone/model", "--quiet"],
        standalone_mode=False)
except Exception as error:
    print(type(error).__name__, error)
assert not tried, tried[0]
"""


def test_the_command_line_opens_no_connection(tmp_path: Path) -> None:
    """Also with a checkpoint's name that hubs would know: it is a folder's, and does not exist."""
    out = tmp_path / "out.mp4"
    hub = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in hub}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(SAMPLE), str(out)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CheckpointError" in done.stdout
    assert out.stat().st_size > 1000
