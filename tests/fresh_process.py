"""Python code in a process of its own, which imports what the tests import."""

import os
import subprocess
import sys


def start(code: str, **environment: str) -> subprocess.Popen:
    """Starts the process. `environment` is added to that of this process."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the GPU has other users
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What the process has printed, once it has ended without an error."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output
