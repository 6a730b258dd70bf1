"""Whatever a plugin does, every run ends as a labelled row, the others go on, and nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import psutil
import pytest

from qbench.pool import Pool
from qbench.run import Result
from qbench.store import Store

PLUGINS = Path(__file__).parent / "plugins"


def qbench(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qbench", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def suite(folder: Path, recipes: str, metrics: str = "top1", time: float = 60) -> None:
    text = f"""
        plugins: ["{PLUGINS / "bad.py"}"]
        tasks:
          - dataset: digits
            models: [digits_resnet]
            calibration: {{images: 16}}
        recipes: [{recipes}]
        metrics: [{metrics}]
        limits: {{time: {time}, memory: 1.5GB}}
    """
    (folder / "s.yaml").write_text(dedent(text))


def results(folder: Path) -> dict[str, Result]:
    found, damaged = Store(folder / "results" / "s").read_all()
    assert not damaged
    return {result.recipe: result for result in found.values()}


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_the_server_that_forks_has_one_thread() -> None:
    with Pool() as pool:
        pool._start()
        assert pool._server is not None
        assert pool._server.stdout is not None
        assert json.loads(pool._server.stdout.readline())["event"] == "ready"
        assert psutil.Process(pool._server.pid).num_threads() == 1


def test_misbehaving_plugins_become_labelled_rows(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    bad = "hangs, segfaults, eats_memory, raises, declines, returns_a_string, trains_in_secret, restructures, poisons"
    suite(tmp_path, f"{bad}, rtn", "answers, aborts, top1", time=8)
    done = qbench(tmp_path, "run", "s.yaml", "--jobs", "2", QBENCH_TEST_PIDS=str(pids))
    assert done.returncode == 1, done.stdout + done.stderr
    found = results(tmp_path)
    assert {name: (r.status, r.phase) for name, r in found.items()} == {
        "fp32": ("ok", "done"),
        "rtn": ("ok", "done"),
        "hangs": ("timeout", "quantize"),
        "segfaults": ("crashed", "quantize"),
        "eats_memory": ("oom", "quantize"),
        "raises": ("error", "quantize"),
        "declines": ("unsupported", "quantize"),
        "returns_a_string": ("error", "quantize"),
        "trains_in_secret": ("error", "quantize"),
        "restructures": ("error", "reload"),
        "poisons": ("error", "reload"),
    } | {"poisons": (found["poisons"].status, found["poisons"].phase)}
    assert found["poisons"].status == "error"
    assert "SIGSEGV" in (found["segfaults"].error or "")
    assert "RuntimeError: the method failed" in (found["raises"].traceback or "")
    assert "not a torch.nn.Module" in (found["returns_a_string"].error or "")
    assert "track='qat'" in (found["trains_in_secret"].error or "")
    assert "structure operations" in (found["restructures"].error or "")
    metrics = found["rtn"].metrics
    assert metrics["answers"].values == {"value": 42.0}
    arrays = Store(tmp_path / "results" / "s").outcomes(found["rtn"].key)
    assert arrays["answers/each"].tolist() == [0, 1, 2]
    assert arrays["correct"].dtype == bool
    assert metrics["aborts"].status == "crashed"
    assert metrics["top1"].status == "ok"
    assert all(gone(int(pid)) for pid in pids.read_text().split())
    table = (tmp_path / "results" / "s" / "LEADERBOARD.md").read_text()
    assert "timeout in quantize" in table
    assert "42" in table


def test_killed_parent_loses_only_what_was_in_flight(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    suite(tmp_path, "'rtn[bits=8]', hangs, 'rtn[bits=4]'")
    command = [sys.executable, "-m", "qbench", "run", "s.yaml", "--jobs", "1"]
    environment = os.environ | {"QBENCH_TEST_PIDS": str(pids)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as parent:
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, 60)
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: all(gone(child.pid) for child in children))
    wait_until(lambda: all(gone(int(pid)) for pid in pids.read_text().split()))
    before = results(tmp_path)
    assert set(before) == {"fp32", "rtn[bits=8]"}
    again = qbench(tmp_path, "run", "s.yaml", "--set", "limits.time=3", QBENCH_TEST_PIDS=str(pids))
    after = results(tmp_path)
    assert {name: r.status for name, r in after.items()} == {
        "fp32": "ok",
        "rtn[bits=8]": "ok",
        "hangs": "timeout",
        "rtn[bits=4]": "ok",
    }, again.stdout + again.stderr
    assert all(after[name].started == before[name].started for name in before)


def test_a_killed_training_goes_on_to_the_same_artifact(tmp_path: Path) -> None:
    suite(tmp_path, "'lsq[steps=60,batch_size=16,ema=0.9]'", time=600)
    command = [sys.executable, "-m", "qbench", "run", "s.yaml"]
    killed = {"QBENCH_CACHE": str(tmp_path / "killed"), "QBENCH_CHECKPOINT_SECONDS": "0.1"}
    checkpoints = tmp_path / "killed" / "checkpoints"
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | killed, stdout=subprocess.DEVNULL) as parent:
        wait_until(lambda: any(checkpoints.glob("*/0/1.pt")), 100)
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: all(gone(child.pid) for child in children))
    assert set(results(tmp_path)) == {"fp32"}
    assert qbench(tmp_path, "run", "s.yaml", **killed).returncode == 0
    again = results(tmp_path)["lsq[steps=60,batch_size=16,ema=0.9]"]
    (resumed_at,) = again.records["training"]["resumed_at"]
    assert 0 < resumed_at < 60
    assert not any(checkpoints.iterdir())
    whole = {"QBENCH_CACHE": str(tmp_path / "whole")}
    assert qbench(tmp_path, "run", "s.yaml", "--results", "unbroken", **whole).returncode == 0
    artifacts = [tmp_path / cache / "artifacts" / f"{again.key}.safetensors" for cache in ("killed", "whole")]
    assert artifacts[0].read_bytes() == artifacts[1].read_bytes()


def test_interrupt_stops_cleanly(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    suite(tmp_path, "hangs")
    command = [sys.executable, "-m", "qbench", "run", "s.yaml"]
    environment = os.environ | {"QBENCH_TEST_PIDS": str(pids)}
    # Whoever runs the tests in the background makes all that they start deaf to it.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        signal.signal(signal.SIGINT, previous)
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, 60)
        parent.send_signal(signal.SIGINT)
        output, _ = parent.communicate(timeout=20)
    assert parent.returncode == 130
    assert "run the same command to go on" in output
    assert set(results(tmp_path)) == {"fp32"}
    wait_until(lambda: all(gone(int(pid)) for pid in pids.read_text().split()))


def test_resume_redo_and_damage(tmp_path: Path) -> None:
    suite(tmp_path, "raises, rtn")
    assert qbench(tmp_path, "run", "s.yaml").returncode == 1
    first = results(tmp_path)
    idle = qbench(tmp_path, "run", "s.yaml")
    assert "3 runs, 0 done now, 1 failed" in idle.stdout
    more = qbench(tmp_path, "run", "s.yaml", "--set", "metrics=[top1, size]", "--json")
    events = [json.loads(line) for line in more.stdout.splitlines()]
    assert "quantize" not in {event.get("phase") for event in events}
    second = results(tmp_path)
    assert second["rtn"].started == first["rtn"].started
    assert set(second["rtn"].metrics) == {"top1", "size"}
    store = Store(tmp_path / "results" / "s")
    half = store.path(second["rtn"].key)
    half.write_text(half.read_text()[: half.stat().st_size // 2])
    told = qbench(tmp_path, "run", "s.yaml", "--redo", "failed", "--json")
    events = [json.loads(line) for line in told.stdout.splitlines()]
    assert any("is damaged" in event.get("text", "") for event in events)
    assert half.with_suffix(".json.damaged").exists()
    third = results(tmp_path)
    assert third["rtn"].status == "ok"
    assert third["fp32"].started == first["fp32"].started
    redone = {event["label"].split("/")[2] for event in events if event["event"] == "finished"}
    assert redone == {"raises", "rtn"}


def test_two_writers_are_refused(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    suite(tmp_path, "hangs")
    command = [sys.executable, "-m", "qbench", "run", "s.yaml"]
    environment = os.environ | {"QBENCH_TEST_PIDS": str(pids)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as parent:
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, 60)
        second = qbench(tmp_path, "run", "s.yaml")
        parent.send_signal(signal.SIGTERM)
    assert second.returncode == 2
    assert "another qbench run" in second.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    suite(tmp_path, "rtn")
    (tmp_path / "results").mkdir(mode=0o500)
    assert qbench(tmp_path, "run", "s.yaml").returncode == 2


def test_results_folder_that_is_a_file(tmp_path: Path) -> None:
    suite(tmp_path, "rtn")
    (tmp_path / "results").write_text("")
    refused = qbench(tmp_path, "run", "s.yaml")
    assert refused.returncode == 2
    assert "is not writable" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
