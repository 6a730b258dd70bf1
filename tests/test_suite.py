"""Suites are read strictly: every mistake is one line that names the file, the place and the way out."""

from pathlib import Path
from textwrap import dedent

import pytest

from qbench import plan as planning
from qbench.errors import UserError
from qbench.run import restore
from qbench.suite import load, parse_size

GOOD = """
tasks:
  - dataset: digits
    models: [digits_resnet]
    calibration: {images: 16}
recipes:
  - rtn: {bits: [8, 4]}
  - [fold_bn, "gpfq[bits=4]", activations]
metrics: [top1, size]
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "suite.yaml"
    path.write_text(dedent(text))
    return path


def plan(path: Path, overrides: list[str] | None = None, only: str | None = None) -> planning.Plan:
    suite, source = load(path, overrides)
    return planning.make(suite, source, [], only)


def test_sweeps_and_reference(tmp_path: Path) -> None:
    made = plan(write(tmp_path, GOOD), ["seeds=[0, 1]"])
    labels = [run.label.removeprefix("digits/digits_resnet/") for run in made.runs]
    assert labels == [
        "fp32/seed=0",
        "rtn[bits=8]/seed=0",
        "rtn[bits=8]/seed=1",
        "rtn[bits=4]/seed=0",
        "rtn[bits=4]/seed=1",
        "fold_bn + gpfq[bits=4] + activations/seed=0",
        "fold_bn + gpfq[bits=4] + activations/seed=1",
    ]
    assert len({run.key for run in made.runs}) == len(made.runs)


def test_keys_are_stable_and_survive_the_trip_to_a_worker(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    first, second = plan(path), plan(path)
    assert [r.key for r in first.runs] == [r.key for r in second.runs]
    assert [restore(r.identity).key for r in first.runs] == [r.key for r in first.runs]


@pytest.mark.parametrize("change", ["tasks.0.calibration.images=17", "tasks.0.calibration.seed=1", "seeds=[5]"])
def test_whatever_matters_changes_the_key(tmp_path: Path, change: str) -> None:
    path = write(tmp_path, GOOD)
    assert not {r.key for r in plan(path).runs} & {r.key for r in plan(path, [change]).runs}


def test_filter_keeps_the_reference(tmp_path: Path) -> None:
    assert [run.recipe[0].name for run in plan(write(tmp_path, GOOD), only="rtn[bits=4").runs] == ["fp32", "rtn"]


def test_filter_that_matches_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="matches none of the 4 runs"):
        plan(write(tmp_path, GOOD), only="nothing")


def test_metrics_of_the_other_task_are_left_out(tmp_path: Path) -> None:
    made = plan(write(tmp_path, GOOD), ["metrics=[top1, map, size]"])
    assert [m.name for m in made.metrics_of(made.runs[0])] == ["top1", "size"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipes=[rtm]", r"suite.yaml:6: recipes.0: unknown method 'rtm'; did you mean 'rtn'"),
        ("recipes=['rtn[bit=4]']", r"has no option 'bit'; did you mean 'bits'"),
        ("recipes=['rtn[bits=0]']", r"option bits=0: input should be greater than or equal to"),
        ("recipes=['rtn[bits=99]']", r"option bits=99: input should be less than or equal to"),
        ("recipes=['rtn[bits=four]']", r"option bits='four': input should be a valid integer"),
        ("recipes=['rtn[bits=4.5]']", r"option bits=4.5: input should be a valid integer"),
        ("recipes=['rtn[bits']", r"is not a plugin reference"),
        ("recipes=['rtn[4]']", r"is not of the form option=value"),
        ("recipes=[]", r"no recipes"),
        ("recipes=[[]]", r"a recipe needs at least one method"),
        ("recipes=[{rtn: {}, fp32: {}}]", r"write one plugin as"),
        ("tasks.0.dataset=digit", r"unknown dataset 'digit'; did you mean 'digits'"),
        ("tasks.0.models=[digits_resne]", r"unknown model 'digits_resne'; did you mean 'digits_resnet'"),
        ("tasks.0.models=[]", r"suite.yaml:4: tasks.0.models: \[\]: list should have at least 1 item"),
        ("tasks.0.models=[digit_detector]", r"is for detection, but digits is for classification"),
        ("metrics=[top2]", r"unknown metric 'top2'; did you mean 'top1'"),
        ("metrics=[]", r"list should have at least 1 item"),
        ("tasks=[]", r"list should have at least 1 item"),
        ("tasks.0.calibration.images=100000", r"calibration asks for 100000 images, but the dataset has \d+"),
        ("tasks.0.calibration.images=0", r"greater than 0"),
        ("seeds=[a]", r"seeds.0: 'a': input should be a valid integer"),
        ("limits.time=fast", r"limits.time: 'fast': input should be a valid number"),
        ("limit.time=1", r"unknown key 'limit'; did you mean 'limits'"),
        ("tasks.0.model=[x]", r"suite.yaml:3: tasks.0.model: unknown key 'model'; did you mean 'models'"),
        ("plugins=[nowhere.py]", r"plugins.0: plugin file .*nowhere.py does not exist"),
        ("name=a/b", r"name: 'a/b': string should match pattern"),
        ("tasks.3.dataset=digits", r"there is no tasks.3 in"),
        ("limits", r"is not of the form key=value"),
    ],
)
def test_mistakes(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        plan(write(tmp_path, GOOD), [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "suite.yaml:1: a suite is a mapping"),
        ("tasks: [\n", "not valid YAML"),
        ("metrics: [top1]\nmetrics: [size]\n", "suite.yaml:2: duplicate key 'metrics'"),
        ("metrics: [top1]\n", "the key 'tasks' is missing"),
    ],
)
def test_files_that_are_no_suites(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, text))


def test_binary_junk_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    with pytest.raises(UserError, match="No such file"):
        load(path)
    path.write_bytes(bytes(range(256)) * 10)
    with pytest.raises(UserError, match="binary"):
        load(path)
    path.write_bytes(b"a" * (10 << 20))
    with pytest.raises(UserError, match="10,485,760 bytes"):
        load(path)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    suite, _ = load(write(tmp_path, GOOD + "limits: {time: 1e2, memory: 2GB}\n"))
    assert (suite.limits.time, suite.limits.memory) == (100, 2_000_000_000)
    assert parse_size("512 MiB") == 512 << 20


def test_broken_plugin_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import qbench\nraise RuntimeError('boom')\n")
    with pytest.raises(UserError, match=r"mine.py failed to import: RuntimeError: boom .*mine.py:2"):
        plan(write(tmp_path, GOOD + "plugins: [mine.py]\n"))


def test_plugin_that_takes_a_built_in_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from qbench import method\n@method('rtn')\ndef mine(model, data):\n    '''Mine.'''\n    return model\n"
    )
    with pytest.raises(UserError, match="the method 'rtn' is already defined in"):
        plan(write(tmp_path, GOOD + "plugins: [mine.py]\n"))
