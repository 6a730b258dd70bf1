"""Plugins: references, options, the three sources, and what goes wrong."""

import importlib.metadata
import subprocess
import sys
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbench import registry
from qbench.errors import UserError
from qbench.registry import KINDS, parse, resolve

PLUGIN = """
from typing import Annotated, Literal
from pydantic import Field
from qbench import method

@method("registry_example", track="qat", paper="arXiv:0000.00000")
def example(
    model, data, *, bits: Annotated[int, Field(ge=1, le=16)] = 8, mode: Literal["a", "b"] = "a",
    lr: float = 0.1, on: bool = False, skip: tuple[str, ...] = (), sizes: tuple[int, ...] = (1, 2),
    name: str | None = None,
):
    \"\"\"An example.

    More about it.
    \"\"\"
    return bits, mode, lr, on, skip
"""


@pytest.fixture(scope="module", autouse=True)
def example(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugins") / "example.py"
    path.write_text(PLUGIN)
    registry.load_file(path)
    return path


def write(folder, text, name="plugin.py"):
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("rtn", "rtn", {}),
        (" rtn[] ", "rtn", {}),
        ("rtn[bits=4]", "rtn", {"bits": 4}),
        ("rtn[ bits = 4 , symmetric=false,]", "rtn", {"bits": 4, "symmetric": False}),
        ("a-b.c_1[x=[1,2],y=z]", "a-b.c_1", {"x": [1, 2], "y": "z"}),
        ("a[lr=1e-3,x=1E5,y=-2.5e-07,z=null]", "a", {"lr": 1e-3, "x": 1e5, "y": -2.5e-07, "z": None}),
        ("a[lr=[1e-3,2],b=1e-4]", "a", {"lr": [1e-3, 2], "b": 1e-4}),
        ("a[path=x=y]", "a", {"path": "x=y"}),
        ("a[sweep=[1, 2, 3],b=3]", "a", {"sweep": [1, 2, 3], "b": 3}),
    ],
)
def test_parse(text, name, options):
    assert parse(text) == (name, options)


@pytest.mark.parametrize("text", ["", "[bits=4]", "rtn[bits=4", "rtn bits=4]", "rtn[4]", "a b", "a[x=1,x=2]", "a[x={]"])
def test_parse_errors_name_the_place(text):
    with pytest.raises(UserError, match=r"^suite\.yaml:3: .+"):
        parse(text, where="suite.yaml:3")


@given(
    bits=st.integers(1, 16),
    lr=st.floats(allow_nan=False, allow_infinity=False),
    on=st.booleans(),
    mode=st.sampled_from("ab"),
    skip=st.lists(st.from_regex(r"[a-z_]{2,6}\.[0-9]", fullmatch=True), max_size=3),
)
def test_references_print_and_parse_back(bits, lr, on, mode, skip):
    given_options = {"bits": bits, "lr": lr, "on": on, "mode": mode, "skip": skip}
    reference = resolve("method", "registry_example", given_options)
    again = resolve("method", *parse(str(reference)))
    assert again == reference
    assert str(again) == str(reference)


def test_defaults_are_filled_in_and_what_was_written_is_shown():
    plain = resolve("method", "registry_example")
    assert str(plain) == "registry_example"
    assert plain.options["bits"] == 8
    assert list(plain.options) == ["bits", "mode", "lr", "on", "skip", "sizes", "name"]
    spelled = resolve("method", "registry_example", {"bits": 8, "sizes": [1, 2], "mode": "b"})
    assert str(spelled) == "registry_example[bits=8,sizes=[1,2],mode=b]"
    assert plain(None, None) == (8, "a", 0.1, False, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, r"option bits=0: input should be greater than or equal to 1"),
        ({"bits": 99}, r"option bits=99: input should be less than or equal to 16"),
        ({"bits": "four"}, r"option bits='four': input should be a valid integer"),
        ({"bits": 4.5}, r"option bits=4\.5"),
        ({"bits": True}, r"option bits=True"),
        ({"bits": "4"}, r"option bits='4'"),
        ({"mode": "c"}, r"option mode='c': input should be 'a' or 'b'"),
        ({"on": 1}, r"option on=1"),
        ({"bit": 4}, r"has no option 'bit'; did you mean 'bits'\? \(options: bits, mode"),
        ({"qqqq": 4}, r"has no option 'qqqq' \(options"),
        ({"skip": "a"}, r"option skip='a'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=rf"^here: method 'registry_example'.*{message}") as caught:
        resolve("method", "registry_example", options, where="here")
    assert "\n" not in str(caught.value)


SCHEDULED = """
from pydantic import BaseModel
from qbench import method

class Pace(BaseModel):
    epochs: int = 10
    lr: float | None = None

@method("paced", track="qat")
def paced(model, data, *, bits: int = 8, pace: Pace = Pace(lr=0.5)):
    return bits, pace

@method("unpaced", track="qat")
def unpaced(model, data, *, pace: Pace):
    return pace

@method("paced_twice", track="qat")
def paced_twice(model, data, *, lr: float = 1.0, pace: Pace = Pace()):
    return pace
"""


def test_the_fields_of_a_model_are_options(tmp_path):
    registry.load_file(write(tmp_path, SCHEDULED))
    plain = resolve("method", "paced")
    assert plain.options == {"bits": 8, "epochs": 10, "lr": 0.5}
    bits, pace = plain(None, None)
    assert (bits, pace.epochs, pace.lr) == (8, 10, 0.5)
    _, pace = resolve("method", *parse("paced[epochs=3,lr=null]"))(None, None)
    assert (pace.epochs, pace.lr) == (3, None)
    _, direct = registry.get("method", "paced")(None, None, epochs=2)
    assert (direct.epochs, direct.lr) == (2, 0.5)
    assert registry.get("method", "paced")(None, None)[1].lr == 0.5
    assert resolve("method", "unpaced")(None, None).epochs == 10
    with pytest.raises(UserError, match=r"has no option 'epoch'; did you mean 'epochs'\? \(options: bits, epochs, lr"):
        resolve("method", "paced", {"epoch": 3})
    with pytest.raises(UserError, match=r"method 'paced_twice' has the option 'lr' twice"):
        resolve("method", "paced_twice")


def test_unknown_plugin_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown method 'kmean'; did you mean 'kmeans'\?; `qbench list method`"):
        resolve("method", "kmean")
    with pytest.raises(UserError, match=r"unknown model 'zzzzz'; `qbench list model`"):
        resolve("model", "zzzzz")


def test_attributes_and_summary():
    plugin = registry.get("method", "registry_example")
    assert plugin.summary == "An example."
    assert plugin.attributes["track"] == "qat"
    assert plugin.attributes["paper"] == "arXiv:0000.00000"
    assert plugin.schema.model_json_schema()["properties"]["bits"]["maximum"] == 16


@pytest.mark.parametrize("kind", KINDS)
def test_built_ins_are_listed_as_they_are_when_imported(kind):
    listed = registry._builtin(kind)
    for name, plugin in listed.items():
        assert plugin.summary, f"{kind} {name} has no summary"
        try:
            imported = registry.get(kind, name)
        except ImportError:
            continue  # an extra that is not installed
        assert imported.summary == plugin.summary
        assert imported.source == plugin.source
        assert plugin.attributes.items() <= imported.attributes.items()


def test_listing_does_not_import_torch():
    code = "import sys; from qbench import registry; registry.index('method'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_that_fails_to_import_says_where_and_leaves_nothing(tmp_path):
    path = write(tmp_path, "from qbench import method\n@method('half')\ndef half(model, data): ...\n1 / 0\n")
    with pytest.raises(
        UserError, match=r"^s\.yaml: plugin file .*plugin\.py failed to import: ZeroDivisionError.*:4\)"
    ):
        registry.load_file(path, where="s.yaml")
    assert "half" not in registry.index("method")
    path.write_text("from qbench import method\n@method('half')\ndef half(model, data): ...\n")
    registry.load_file(path)
    assert "half" in registry.index("method")


@pytest.mark.parametrize("text", ["def f(:", "import sys; sys.exit(3)", "import no_such_module", "\0"])
def test_files_that_cannot_be_imported(tmp_path, text):
    with pytest.raises(UserError, match="failed to import"):
        registry.load_file(write(tmp_path, text))


def test_a_file_that_is_not_there_or_not_python(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        registry.load_file(tmp_path / "nowhere.py")
    with pytest.raises(UserError, match="is not a Python file"):
        registry.load_file(write(tmp_path, "", name="plugin.txt"))


def test_a_built_in_name_cannot_be_taken(tmp_path):
    path = write(tmp_path, "from qbench import method\n@method('rtn')\ndef mine(model, data): ...\n")
    with pytest.raises(UserError, match=r"the method 'rtn' is already defined in .*rtn\.py; choose another name"):
        registry.load_file(path)
    assert registry.index("method")["rtn"].source.name == "rtn.py"


def test_a_file_is_loaded_once(example):
    before = registry.get("method", "registry_example")
    registry.load_file(example)
    assert registry.get("method", "registry_example") is before


def test_installed_plugins_that_fail_harm_nobody(monkeypatch, tmp_path):
    (tmp_path / "good_plugin.py").write_text(
        "from qbench import method\n@method('installed')\ndef f(model, data): ...\n"
    )
    (tmp_path / "bad_plugin.py").write_text("raise RuntimeError('broken on purpose')\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = [
        importlib.metadata.EntryPoint("bad", "bad_plugin", "qbench"),
        importlib.metadata.EntryPoint("good", "good_plugin", "qbench"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    registry.load_entry_points.cache_clear()
    registry.load_entry_points()
    assert "installed" in registry.index("method")
    assert registry.broken() == {"bad (bad_plugin)": "RuntimeError: broken on purpose"}
    registry._BROKEN.clear()


def test_a_plugin_is_its_source(example):
    before = registry.get("method", "registry_example").fingerprint
    assert len(before) == 16
    assert before != registry.get("method", "rtn").fingerprint


def test_the_content_of_files_that_options_name_counts(tmp_path):
    table = tmp_path / "table.csv"
    step = registry.resolve("method", "mixed", {"latency_table": str(table)})
    assert step.files == {}
    table.write_text("a")
    before = step.files
    table.write_text("b")
    assert before.keys() == step.files.keys() == {str(table)}
    assert before != step.files
    assert registry.resolve("method", "mixed").files == {}
