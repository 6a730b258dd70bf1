"""Provenance, and the lock for what needs the machine alone."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from qbench.machine import exclusive, machine


def test_provenance_is_json_and_names_what_matters() -> None:
    facts = json.loads(json.dumps(machine()))
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] > 1e8
    assert facts["packages"]["torch"]
    assert set(facts) >= {"git", "gpu", "os", "load", "cpu_flags", "python", "qbench"}


def test_provenance_does_not_import_torch() -> None:
    code = "import sys, qbench.machine as m; m.machine(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


_HOLD = """
import sys, time
from pathlib import Path
from qbench.machine import exclusive
with exclusive(path=Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def _hold(path: Path, seconds: float) -> subprocess.Popen[str]:
    code = textwrap.dedent(_HOLD)
    process = subprocess.Popen([sys.executable, "-c", code, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    return process


def test_a_second_process_waits_and_is_told_for_whom(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    other = _hold(path, 0.5)
    told: list[str] = []
    with exclusive(told.append, path):
        assert other.wait(5) == 0, "the other process had ended before the lock was given"
    assert len(told) == 1
    assert f"process {other.pid}" in told[0]


def test_nobody_is_told_when_the_machine_is_free(tmp_path: Path) -> None:
    told: list[str] = []
    for _ in range(2):
        with exclusive(told.append, tmp_path / "lock"):
            pass
    assert told == []
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o666


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    other = _hold(tmp_path / "lock", 60)
    threading.Timer(0.2, other.send_signal, [signal.SIGKILL]).start()
    begin = time.monotonic()
    with exclusive(path=tmp_path / "lock"):
        assert time.monotonic() - begin < 20
    other.wait(5)


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), exclusive(path=tmp_path / "lock"):
        raise ZeroDivisionError
    with exclusive(pytest.fail, tmp_path / "lock"):
        pass
