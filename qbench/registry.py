"""Plugins: the decorators, signature -> schema, references `name[option=value]`, and the three sources of plugins.

The built-in plugins are found by reading the source of their files, not by running it, so that listing them does not
import torch; a plugin's module is imported when the plugin is used.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from qbench.errors import UserError

Kind = Literal["method", "model", "dataset", "metric", "runtime"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)
Track = Literal["ptq", "qat", "structure"]
F = TypeVar("F", bound=Callable[..., Any])

Bits = Annotated[int, Field(ge=1, le=16)]
"""Option type: a bit width from 1 to 16."""
EdgeBits = Bits | Literal[32] | None
"""Option type: the bit width of the first and the last layer; 32 leaves them in float, None means no difference."""
LayerBits = dict[str, Bits | Literal[32]] | None
"""Option type: the bit widths of single layers, by their names or first parts of names; 32 leaves them in float."""

_METHOD = AfterValidator(lambda text: str(resolve("method", *parse(text))))
MethodReference = Annotated[str, _METHOD]
"""Option type: another method, as `name[option=value]`, whose source then counts as the plugin's own."""


class File:
    """Marks an option that names a file; `find` says where it is."""

    def __init__(self, find: Callable[[str], Path] = Path) -> None:
        self.find = find


DataFile = Annotated[str | None, File()]
"""Option type: the path of a file, whose content then counts as part of the option; None means none."""

_PACKAGE = Path(__file__).parent
_FOLDERS: dict[Kind, str] = {kind: f"{kind}s" for kind in KINDS}


@dataclass(frozen=True)
class Plugin:
    """A registered plugin. `attributes` are what its decorator was told (track, unit, direction, paper ...)."""

    kind: Kind
    name: str
    summary: str
    source: Path
    attributes: Mapping[str, Any] = field(default_factory=dict)
    function: Callable[..., Any] | None = None
    module: str | None = None
    """Where a built-in that has not been imported yet is defined."""

    @functools.cached_property
    def schema(self) -> type[BaseModel]:
        """The options: the keyword-only parameters of the function, and the fields of those that are models."""
        fields: dict[str, Any] = {}
        for name, (hint, default) in self._keywords.items():
            own = _fields(hint, default) if name in self._models else {name: (hint, default)}
            for option in own.keys() & fields:
                raise UserError(f"{self.source}: {self.kind} {self.name!r} has the option {option!r} twice")
            fields |= own
        config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
        return create_model(f"{self.name}_options", __config__=config, **fields)

    @functools.cached_property
    def _keywords(self) -> dict[str, tuple[Any, Any]]:
        """Type and default (`...` if there is none) of the keyword-only parameters."""
        assert self.function is not None
        hints = typing.get_type_hints(self.function, include_extras=True)
        return {
            name: (hints.get(name, Any), ... if parameter.default is parameter.empty else parameter.default)
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }

    @functools.cached_property
    def _models(self) -> dict[str, type[BaseModel]]:
        """The parameters that stand for several options: those annotated with a pydantic model."""
        hints = ((name, hint) for name, (hint, _) in self._keywords.items())
        return {name: hint for name, hint in hints if isinstance(hint, type) and issubclass(hint, BaseModel)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the source file that defines the plugin: part of a run's identity."""
        return hashlib.sha256(self.source.read_bytes()).hexdigest()[:16]

    def __call__(self, *args: Any, **options: Any) -> Any:
        assert self.function is not None
        for name, group in self._models.items():
            own = {option: options.pop(option) for option in group.model_fields if option in options}
            if own:
                default = self._keywords[name][1]
                known = default.model_dump() if isinstance(default, BaseModel) else {}
                options[name] = group.model_validate(known | own)
        return self.function(*args, **options)


def _fields(group: type[BaseModel], default: Any) -> dict[str, Any]:
    """The options that a parameter stands for, with the defaults that it gives them."""
    hints = typing.get_type_hints(group, include_extras=True)
    fields = group.model_fields.items()
    if isinstance(default, BaseModel):
        return {option: (hints[option], getattr(default, option)) for option, _ in fields}
    return {option: (hints[option], ... if info.is_required() else info.default) for option, info in fields}


@dataclass(frozen=True)
class Reference:
    """A plugin with its options filled in; prints as `name[option=value]`, showing the options that were written."""

    kind: Kind
    name: str
    options: Mapping[str, Any]
    shown: Mapping[str, Any]
    """The options that were written, whether or not they equal the defaults."""

    def __str__(self) -> str:
        if not self.shown:
            return self.name
        return f"{self.name}[{','.join(f'{key}={_scalar(value)}' for key, value in self.shown.items())}]"

    @property
    def plugin(self) -> Plugin:
        return get(self.kind, self.name)

    @property
    def plugins(self) -> list[Plugin]:
        """The plugin, and the methods that its options name."""
        fields = self.plugin.schema.model_fields
        named = [parse(value)[0] for key, value in self.options.items() if _METHOD in fields[key].metadata]
        return [self.plugin, *(get("method", name) for name in named)]

    @property
    def files(self) -> dict[str, str]:
        """Hashes of the files that its options name, where these exist."""
        fields = self.plugin.schema.model_fields
        marks = {key: m for key in self.options for m in fields[key].metadata if isinstance(m, File)}
        paths = {self.options[key]: mark.find(self.options[key]) for key, mark in marks.items() if self.options[key]}
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in paths.items() if path.is_file()
        }

    def with_options(self, **options: Any) -> Reference:
        """The same with these options.

        Raises:
            UserError: one is unknown, or has a wrong value.
        """
        return resolve(self.kind, self.name, {**self.shown, **options})

    def __call__(self, *args: Any) -> Any:
        return self.plugin(*args, **self.options)


# ---------------------------------------------------------------------------------------------------- decorators


_PLUGINS: dict[tuple[Kind, str], Plugin] = {}
_BROKEN: dict[str, str] = {}
_loading: list[Path] = []


def _register(kind: Kind, name: str, **attributes: Any) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        source = Path(inspect.getsourcefile(function) or "<unknown>").resolve()
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        known = index(kind).get(name)
        if known is not None and known.source != source:
            raise UserError(f"{source}: the {kind} {name!r} is already defined in {known.source}; choose another name")
        _PLUGINS[kind, name] = Plugin(kind, name, summary, source, attributes, function)
        return function

    return decorate


def method(
    name: str, *, track: Track = "ptq", paper: str | None = None, in_the_manner_of: bool = False
) -> Callable[[F], F]:
    """Register a method: `(model, data, *, options) -> model`.

    Args:
        name: how suites refer to it.
        track: `ptq` sees unlabelled calibration images only, `qat` may train, `structure` keeps the float function.
        paper: where the method comes from.
        in_the_manner_of: the paper's details could not be reproduced exactly; its results are not credited.
    """
    return _register("method", name, track=track, paper=paper, in_the_manner_of=in_the_manner_of)


def model(name: str) -> Callable[[F], F]:
    """Register a model: `(*, options) -> qbench.Model`."""
    return _register("model", name)


def dataset(name: str) -> Callable[[F], F]:
    """Register a dataset: `(*, options) -> qbench.Dataset`."""
    return _register("dataset", name)


def metric(
    name: str,
    *,
    unit: str,
    direction: Literal["higher", "lower", "none"],
    task: str | None = None,
    exclusive: bool = False,
) -> Callable[[F], F]:
    """Register a metric: `(finished, *, options) -> dict` of raw measurements.

    Args:
        name: how suites refer to it.
        unit: of the main value.
        direction: whether higher or lower is better.
        task: the only task it applies to; None for all.
        exclusive: measured alone on the machine (latency, energy).
    """
    return _register("metric", name, unit=unit, direction=direction, task=task, exclusive=exclusive)


def runtime(name: str) -> Callable[[F], F]:
    """Register a runtime: `(*, options) -> qbench.runtimes.base.Runtime`."""
    return _register("runtime", name)


# ---------------------------------------------------------------------------------------------------- look-up


@functools.cache
def _builtin(kind: Kind) -> dict[str, Plugin]:
    """The built-in plugins of a kind, read from their source without importing it."""
    found: dict[str, Plugin] = {}
    for path in sorted((_PACKAGE / _FOLDERS[kind]).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == kind:
                    name = ast.literal_eval(call.args[0])
                    attributes = {key.arg: ast.literal_eval(key.value) for key in call.keywords if key.arg}
                    summary = (ast.get_docstring(node) or "").partition("\n")[0]
                    module = f"qbench.{_FOLDERS[kind]}.{path.stem}"
                    found[name] = Plugin(kind, name, summary, path.resolve(), attributes, module=module)
    return found


def index(kind: Kind) -> dict[str, Plugin]:
    """Every known plugin of a kind by name; those not imported yet have no function."""
    loaded = {name: plugin for (k, name), plugin in _PLUGINS.items() if k == kind}
    return _builtin(kind) | loaded


def get(kind: Kind, name: str, where: str = "") -> Plugin:
    """The plugin of that kind and name, imported.

    Raises:
        UserError: there is none; the message names the nearest ones.
    """
    known = index(kind)
    if name not in known:
        raise UserError(
            f"{_at(where)}unknown {kind} {name!r}{nearest(name, known)}; `qbench list {kind}` shows them all"
        )
    if known[name].function is None:
        importlib.import_module(known[name].module or "")
    return _PLUGINS[kind, name]


def nearest(name: str, known: Iterator[str] | Mapping[str, Any] | list[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no name is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_scalar, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {_scalar(item)}' for key, item in value.items())}}}"
    return str(value)


class Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number, as in YAML 1.2."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)

_REFERENCE = re.compile(r"^\s*([A-Za-z0-9_.\-]+)\s*(?:\[(.*)\])?\s*$", re.DOTALL)


def parse(text: str, where: str = "") -> tuple[str, dict[str, Any]]:
    """Split `name[option=value,...]` into the name and the raw options.

    Raises:
        UserError: the text is not of that form.
    """
    match = _REFERENCE.match(text)
    if not match:
        raise UserError(f"{_at(where)}{text!r} is not a plugin reference; write `name` or `name[option=value]`")
    name, inside = match.groups()
    options: dict[str, Any] = {}
    for part in _split(inside or ""):
        if not part.strip():
            continue
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"{_at(where)}{part.strip()!r} in {text!r} is not of the form option=value")
        if key.strip() in options:
            raise UserError(f"{_at(where)}{text!r} gives the option {key.strip()!r} twice")
        try:
            options[key.strip()] = yaml.load(value, Loader)
        except yaml.YAMLError:
            raise UserError(f"{_at(where)}{value.strip()!r} in {text!r} is not a value") from None
    return name, options


def _split(text: str) -> list[str]:
    """The parts between the commas that are in no brackets."""
    depths = itertools.accumulate((character in "[{") - (character in "]}") for character in text)
    cuts = [place for place, depth in enumerate(depths) if depth == 0 and text[place] == ","]
    return [text[start + 1 : end] for start, end in itertools.pairwise([-1, *cuts, len(text)])]


def resolve(kind: Kind, name: str, options: Mapping[str, Any] | None = None, where: str = "") -> Reference:
    """Check the options against the plugin's signature and fill in the defaults.

    Raises:
        UserError: unknown plugin, unknown option, or a value of the wrong type or range.
    """
    plugin = get(kind, name, where)
    try:
        # As JSON, where a list may stand for a tuple although everything else is checked strictly.
        filled = plugin.schema.model_validate_json(json.dumps(dict(options or {}), default=str))
    except ValidationError as error:
        raise UserError(_explain(plugin, error, where)) from None
    values = filled.model_dump(mode="json")
    return Reference(kind, name, values, {key: values[key] for key in options or {}})


def _explain(plugin: Plugin, error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    option = str(first["loc"][0]) if first["loc"] else ""
    known = plugin.schema.model_fields
    head = f"{_at(where)}{plugin.kind} {plugin.name!r}"
    if first["type"] == "extra_forbidden":
        options = ", ".join(known) or "none"
        return f"{head} has no option {option!r}{nearest(option, list(known))} (options: {options})"
    if first["type"] == "missing":
        return f"{head} needs the option {option!r}; see `qbench describe {plugin.name}`"
    return f"{head}: option {option}={first['input']!r}: {first['msg'][0].lower() + first['msg'][1:]}"


# ---------------------------------------------------------------------------------------------------- sources


def load_file(path: str | Path, where: str = "") -> None:
    """Import a plugin file.

    Raises:
        UserError: there is no such file, it fails to import, or it defines a name that is taken.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise UserError(f"{_at(where)}plugin file {path} does not exist")
    name = f"qbench_plugin_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{_at(where)}{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        _forget(name, file)
        raise
    except (Exception, SystemExit) as error:
        _forget(name, file)
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        raise UserError(f"{_at(where)}plugin file {path} failed to import: {reason}") from error


def _forget(module: str, file: Path) -> None:
    del sys.modules[module]
    for key in [key for key, plugin in _PLUGINS.items() if plugin.source == file]:
        del _PLUGINS[key]


@functools.cache
def load_entry_points() -> None:
    """Import the plugins of installed packages (entry-point group `qbench`); `broken` has those that fail."""
    for entry in importlib.metadata.entry_points(group="qbench"):
        try:
            entry.load()
        except (Exception, SystemExit) as error:
            _BROKEN[f"{entry.name} ({entry.value})"] = f"{type(error).__name__}: {error}"


def load_plugins(files: Iterable[str]) -> None:
    """Import the plugins of installed packages and of these files."""
    load_entry_points()
    for path in files:
        load_file(path)


def broken() -> dict[str, str]:
    """Installed plugins that failed to import, with the reason."""
    return dict(_BROKEN)
