"""The command line as a stranger meets it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def qbench(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qbench", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "method"], ["run", "--help"]])
def test_looking_around_does_not_import_torch(arguments: list[str]) -> None:
    code = f"import sys; sys.argv = ['qbench', *{arguments!r}]\nfrom qbench.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_list_names_every_kind() -> None:
    plugins = json.loads(qbench("list", "--json").stdout)["plugins"]
    assert {p["kind"] for p in plugins} == {"method", "model", "dataset", "metric", "runtime"}
    assert {
        "fp32",
        "cast",
        "rtn",
        "apot",
        "pot",
        "kmeans",
        "gpfq",
        "activations",
        "lsq",
        "fold_bn",
        "bias_correct",
    } <= {p["name"] for p in plugins if p["kind"] == "method"}
    assert all(p["summary"] for p in plugins)


def test_describe_shows_options_types_defaults_track_and_paper() -> None:
    text = qbench("describe", "gpfq").stdout
    assert "track: ptq" in text
    assert "paper: arXiv:2201.11113" in text
    assert "bits: integer from 1 to 12 = 4" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "methods"], "did you mean 'method'"),
        (["describe", "gpfk"], "did you mean 'gpfq'"),
        (["show", "ffffffffffff"], "matches no result"),
        (["export", "ffffffffffff", "-o", "exported"], "matches no result"),
        (["check", "rtn[bits=0]"], "option bits=0"),
        (["run", "nowhere.yaml"], "No such file"),
        (["run", "suites/quickstart.yaml", "--redo", "some"], "write failed, stale or all"),
        (["board", "nowhere"], "holds no results"),
        (["list", "--plugin", "nowhere.py"], "does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = qbench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_every_suite_can_be_planned_or_says_what_is_missing() -> None:
    for suite in sorted((ROOT / "suites").glob("*.yaml")):
        done = qbench("run", str(suite), "--dry-run", "--results", "/nonexistent")
        assert done.returncode == 0 or "not found" in done.stderr, done.stderr


def readme(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_ci_runs_the_commands_of_the_readme() -> None:
    run, test, *_ = (block.strip() for block in readme("sh"))
    assert run.endswith("qbench run suites/quickstart.yaml --results my-results")
    assert test in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_smallest_plugin_of_the_readme_keeps_its_promises(tmp_path: Path) -> None:
    code = readme("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / "nearest.py").write_text(code)
    done = qbench("check", "nearest", "--plugin", "nearest.py", "--json", cwd=tmp_path)
    checks = json.loads(done.stdout)
    assert done.returncode == 0, checks
    assert len(checks) > 5
