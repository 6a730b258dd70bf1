"""Commands that only read results need no torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "imagenet_small"
WITHOUT_TORCH = "import sys; from qbench.cli import app; app(standalone_mode=False); assert 'torch' not in sys.modules"


def run(*arguments: str) -> str:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_board_and_show_work_without_torch(tmp_path: Path) -> None:
    folder = shutil.copytree(RESULTS, tmp_path / "imagenet_small")
    (folder / "LEADERBOARD.md").unlink()
    page = run("board", str(folder))
    assert page.startswith("# imagenet_small")
    assert (folder / "LEADERBOARD.md").read_text(encoding="utf-8").strip() == page.strip()
    key = next(folder.glob("*.json")).stem
    assert key in run("show", key, "--results", str(tmp_path))


def test_show_says_why_a_runtime_was_taken(tmp_path: Path) -> None:
    source = next(path for path in RESULTS.glob("*.json") if '"integer_layers"' in path.read_text())
    result = json.loads(source.read_text())
    result["metrics"]["latency"]["values"] |= {
        "runtime": "openvino",
        "considered": {
            "onnxruntime": {"integer_layers": 1, "layers": 53, "seconds": [0.004, 0.009, 0.005]},
            "openvino": {"integer_layers": 53, "layers": 53, "seconds": [0.002, 0.002, 0.003]},
            "torch": {"reason": "no integer kernel [for] it"},
        },
    }
    (tmp_path / source.name).write_text(json.dumps(result))
    rows = [line.split() for line in run("show", source.stem, "--results", str(tmp_path)).splitlines()]
    assert ["openvino", "2", "53", "of", "53", "taken"] in rows
    assert ["onnxruntime", "5", "1", "of", "53"] in rows
    assert ["torch", "no", "integer", "kernel", "[for]", "it"] in rows


def test_show_has_all_sizes_beside_each_other(tmp_path: Path) -> None:
    source = next(path for path in RESULTS.glob("*.json") if '"integer_layers"' in path.read_text())
    result = json.loads(source.read_text())
    values = result["metrics"]["size"]["values"]
    values |= {"gzip_bytes": 2**20, "formats": {"onnx": {"bytes": 2**21, "float_bytes": 2**23}}}
    values["formats"]["openvino"] = {"reason": "no [such] thing"}
    (tmp_path / source.name).write_text(json.dumps(result))
    rows = [line.split() for line in run("show", source.stem, "--results", str(tmp_path)).splitlines()]
    assert ["ONNX", "2,097,152", "2.000", "4.00"] in rows
    assert ["OpenVINO", "no", "[such]", "thing"] in rows
    ratio = f"{values['float_bytes'] / 2**20:.2f}"
    assert ["artifact", "behind", "gzip", "1,048,576", "1.000", ratio] in rows
