"""Commands that only read results need no torch."""

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
