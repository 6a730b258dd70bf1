"""Suites: a YAML file, read strictly, becomes tasks x models x recipes x seeds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from qbench import registry
from qbench.errors import UserError
from qbench.registry import Kind, Loader, Reference

_LARGEST = 1 << 20  # bytes; a suite is written by hand
Place = tuple[str | int, ...]
Recipe = tuple[Reference, ...]


def parse_size(text: Any) -> Any:
    """`8GB`, `512 MiB` or a number of bytes, as bytes."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([kMGT]?)(i?)B\s*", text) if isinstance(text, str) else None
    if not match:
        return text
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix or " "))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Limits(_Strict):
    """What one run may use; beyond it the run is killed and labelled."""

    time: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds."""
    memory: Annotated[int, BeforeValidator(parse_size), Field(gt=0)] | None = None
    """Bytes; None means the machine's memory divided by the number of jobs."""


class Calibration(_Strict):
    """The images that every method calibrates on."""

    images: Annotated[int, Field(gt=0)] = 128
    seed: Annotated[int, Field(ge=0)] = 0


Raw = str | dict[str, dict[str, Any] | None]
RawRecipe = Raw | list[Raw]


class Task(_Strict):
    """A dataset and the models that are quantized on it."""

    dataset: Raw
    models: Annotated[list[Raw], Field(min_length=1)]
    calibration: Calibration = Calibration()
    recipes: list[RawRecipe] | None = None
    """In place of the suite's."""


class Suite(_Strict):
    """A suite as written. Runs are planned from it by `qbench.plan`."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    description: str = ""
    plugins: list[str] = []
    tasks: Annotated[list[Task], Field(min_length=1)]
    recipes: list[RawRecipe] = []
    metrics: Annotated[list[Raw], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    limits: Limits = Limits()
    jobs: Annotated[int, Field(gt=0)] | None = None
    """Runs at a time; None means one for every two cores."""


class Source:
    """A parsed YAML file that remembers on which line each value stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[Place, int] = {}
        self.value = self._read()

    def _read(self) -> Any:
        try:
            if self.path.stat().st_size > _LARGEST:
                raise UserError(
                    f"{self.path} has {self.path.stat().st_size:,} bytes: a suite is a YAML file of a few kB"
                )
            text = self.path.read_text(encoding="utf-8")
            if "\0" in text:
                raise UserError(f"{self.path} is a binary file, not a YAML suite")
            node = yaml.compose(text, Loader=Loader)
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is a binary file, not a YAML suite") from None
        except OSError as error:
            raise UserError(f"suite {self.path}: {error.strerror or error}") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise UserError(f"{self.path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
        if node is None:
            raise UserError(f"{self.path} is empty; a suite needs the keys `tasks` and `metrics`")
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{self.path}:{node.start_mark.line + 1}: a suite is a mapping with the keys `tasks`, ...")
        return self._build(node, ())

    def _build(self, node: yaml.Node, place: Place) -> Any:
        self.lines[place] = node.start_mark.line + 1
        if isinstance(node, yaml.SequenceNode):
            return [self._build(child, (*place, i)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            built: dict[str, Any] = {}
            for key_node, child in node.value:
                key = str(self._scalar(key_node))
                if key in built:
                    raise UserError(f"{self.path}:{key_node.start_mark.line + 1}: duplicate key {key!r}; keep one")
                built[key] = self._build(child, (*place, key))
                self.lines[(*place, key)] = key_node.start_mark.line + 1
            return built
        return self._scalar(node)

    @staticmethod
    def _scalar(node: yaml.Node) -> Any:
        loader = Loader("")
        try:
            return loader.construct_object(node, deep=True)
        finally:
            loader.dispose()

    def where(self, place: Place) -> str:
        """`file:line: key.path`, as near as YAML knows it."""
        keys = ".".join(map(str, place))
        return f"{self.path}:{self.lines[self._known(place)]}" + (f": {keys}" if keys else "")

    def _known(self, place: Place) -> Place:
        """The innermost part of a place that stands in the file."""
        while place not in self.lines:
            place = place[:-1]
        return place

    def _mark(self, value: Any, place: Place, line: int) -> None:
        """An overriding value and all in it stand on the line of what they override."""
        self.lines[place] = line
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            self._mark(child, (*place, key), line)

    def override(self, assignment: str) -> None:
        """Apply `--set key.path=value`; the value is YAML."""
        keys, equals, value = assignment.partition("=")
        place: list[str | int] = [int(key) if key.isdigit() else key for key in keys.strip().split(".")]
        if not equals or not keys.strip():
            raise UserError(f"--set {assignment!r} is not of the form key=value, for example --set limits.time=60")
        target = self.value
        for i, key in enumerate(place[:-1]):
            if isinstance(target, dict) and isinstance(key, str):
                target = target.setdefault(key, {})
            elif isinstance(target, list) and isinstance(key, int) and key < len(target):
                target = target[key]
            else:
                raise UserError(
                    f"--set {assignment!r}: there is no {'.'.join(map(str, place[: i + 1]))} in {self.path}"
                )
        last = place[-1]
        if isinstance(target, dict) or (isinstance(target, list) and isinstance(last, int) and last < len(target)):
            target[last] = yaml.load(value, Loader=Loader)  # type: ignore[index]
            line = self.lines[self._known(tuple(place))]
            self.lines.update(
                {tuple(place[:i]): line for i in range(1, len(place)) if tuple(place[:i]) not in self.lines}
            )
            self._mark(target[last], tuple(place), line)  # type: ignore[index]
        else:
            raise UserError(f"--set {assignment!r}: there is no {keys} in {self.path}")


def load(path: Path, overrides: list[str] | None = None, plugins: list[str] | None = None) -> tuple[Suite, Source]:
    """Read a suite strictly, apply the overrides, and import its plugin files.

    Raises:
        UserError: anything in it is wrong; the message names file, line and key.
    """
    source = Source(path)
    for assignment in overrides or []:
        source.override(assignment)
    source.value.setdefault("name", path.stem)
    try:
        suite = Suite.model_validate(source.value)
    except ValidationError as error:
        raise UserError(_explain(source, error)) from None
    registry.load_entry_points()
    for i, plugin in enumerate(suite.plugins):
        registry.load_file(path.parent / plugin, source.where(("plugins", i)))
    for plugin in plugins or []:
        registry.load_file(plugin)
    return suite, source


def _explain(source: Source, error: ValidationError) -> str:
    # A value may be one of several forms: the form that got furthest says best what is wrong.
    first = max(error.errors(), key=lambda e: len(_place(source, e["loc"])))
    place = _place(source, first["loc"])
    key = str(first["loc"][-1])
    if first["type"] == "extra_forbidden":
        known = [*Suite.model_fields, *Task.model_fields, *Limits.model_fields, *Calibration.model_fields]
        return f"{source.where(place)}: unknown key {key!r}{registry.nearest(key, known)}"
    if first["type"] == "missing":
        return f"{source.where(place)}: the key {key!r} is missing"
    value = repr(first["input"])
    if first["type"] in ("string_type", "dict_type") and place and place[0] in ("tasks", "recipes", "metrics"):
        form = "write a plugin as `name`, `name[option=value]` or `name: {option: value}`"
        return f"{source.where(place)}: {value} is not a plugin reference; {form}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{source.where(place)}: {value if len(value) < 60 else value[:57] + '...'}: {message}"


def _place(source: Source, location: tuple[int | str, ...]) -> Place:
    """The part of a pydantic location that is a place in the file."""
    place: Place = ()
    for key in location:
        if (*place, key) in source.lines:
            place = (*place, key)
    return place


def references(kind: Kind, raw: Raw, where: str) -> list[Reference]:
    """One reference, or one for each combination of the options that are lists.

    Raises:
        UserError: unknown plugin or option, wrong type or range.
    """
    if isinstance(raw, str):
        name, options = registry.parse(raw, where)
    else:
        if len(raw) != 1:
            raise UserError(f"{where}: write one plugin as `name: {{option: value}}`; got the keys {', '.join(raw)}")
        name, options = next((name, dict(options or {})) for name, options in raw.items())
    fields = registry.get(kind, name, where).schema.model_fields
    sweeps = [key for key, value in options.items() if isinstance(value, list) and not _takes_list(fields.get(key))]
    choices = itertools.product(*(options[key] for key in sweeps))
    return [registry.resolve(kind, name, options | dict(zip(sweeps, choice, strict=True)), where) for choice in choices]


def _takes_list(info: Any) -> bool:
    """Whether the option itself is a list, so that a list is its value and not a sweep."""
    return info is not None and any(
        part.get("type") == "array" for part in _forms(TypeAdapter(info.annotation).json_schema())
    )


def _forms(schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [schema, *schema.get("anyOf", [])]


def recipes(raw: RawRecipe, where: str) -> list[Recipe]:
    """The recipes that one entry describes: every combination of its methods' sweeps."""
    steps = raw if isinstance(raw, list) else [raw]
    if not steps:
        raise UserError(f"{where}: a recipe needs at least one method")
    return list(itertools.product(*(references("method", step, where) for step in steps)))
