"""Results are written whole or not at all, and damage is found."""

from pathlib import Path

import numpy as np
import pytest
from ended import ended

from qbench.errors import UserError
from qbench.run import Result
from qbench.store import Store, find, write_atomically


def result(key: str = "0123456789ab") -> Result:
    return ended(key=key, records={"loss": [1.0, 0.5]})


def test_round_trip(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(result(), {"correct": np.array([True, False])})
    assert store.read("0123456789ab") == result()
    assert store.outcomes("0123456789ab")["correct"].tolist() == [True, False]


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, lambda partial: partial.write_text("old"))

    def fail(partial: Path) -> None:
        partial.write_text("ne")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_damaged_results_are_told_and_set_aside(tmp_path: Path, keep: int) -> None:
    store = Store(tmp_path)
    store.write(result(), {"correct": np.array([True])})
    path = store.path("0123456789ab")
    path.write_bytes(path.read_bytes()[:keep])
    found, damaged = store.read_all()
    assert found == {}
    assert len(damaged) == 1
    assert "0123456789ab.json is damaged" in damaged[0]
    assert len(store.tidy()) == 1
    assert store.read_all() == ({}, [])
    assert (tmp_path / "0123456789ab.json.damaged").exists()


def test_results_without_their_outcomes_are_set_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(result(), {"correct": np.array([True])})
    store.outcomes_path("0123456789ab").write_bytes(b"half")
    assert len(store.tidy()) == 1


def test_find_by_the_beginning_of_a_key(tmp_path: Path) -> None:
    store = Store(tmp_path / "suite")
    store.folder.mkdir()
    store.write(result("aaaaaaaaaaaa"))
    store.write(result("aaaabbbbbbbb"))
    assert find(tmp_path, "aaaab")[1] == "aaaabbbbbbbb"
    with pytest.raises(UserError, match="matches 2 results"):
        find(tmp_path, "aaaa")
    with pytest.raises(UserError, match="matches no result"):
        find(tmp_path, "f")


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(result(), {"correct": np.array([True])})
    (tmp_path / ".0123456789ab.json.4711").write_text("ha")
    store.tidy()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0123456789ab.json", "0123456789ab.npz"]


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not writable"):
        Store(tmp_path / "file" / "suite").check_writable()
    Store(tmp_path / "new" / "suite").check_writable()
    assert not (tmp_path / "new").exists()
