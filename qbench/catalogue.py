"""`qbench list` and `qbench describe`: what plugins there are and what options they take."""

from __future__ import annotations

import json
from typing import Any

from qbench import registry
from qbench.errors import UserError
from qbench.registry import KINDS, Plugin


def show_list(kind: str | None, plugins: list[str], *, as_json: bool) -> None:
    """Print the plugins of one kind, or of all."""
    if kind is not None and kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}{registry.nearest(kind, list(KINDS))}; kinds: {', '.join(KINDS)}")
    registry.load_plugins(plugins)
    kinds = [kind] if kind else list(KINDS)
    known = [plugin for k in kinds for plugin in sorted(registry.index(k).values(), key=lambda p: p.name)]
    broken = registry.broken()
    if as_json:
        print(json.dumps({"plugins": [_entry(p) for p in known], "broken": broken}, indent=1))
        return
    width = max((len(p.name) for p in known), default=0)
    for k in kinds:
        print(f"{k}s")
        for plugin in (p for p in known if p.kind == k):
            print(f"  {plugin.name:<{width}}  {plugin.summary}")
    for name, reason in broken.items():
        print(f"broken: {name}: {reason}")


def _entry(plugin: Plugin) -> dict[str, Any]:
    return {"kind": plugin.kind, "name": plugin.name, "summary": plugin.summary, **plugin.attributes}


def describe(name: str, plugins: list[str], *, as_json: bool) -> None:
    """Print what one plugin is; a name may belong to plugins of several kinds."""
    registry.load_plugins(plugins)
    found = [registry.get(kind, name) for kind in KINDS if name in registry.index(kind)]
    if not found:
        everything = [known for kind in KINDS for known in registry.index(kind)]
        raise UserError(f"unknown plugin {name!r}{registry.nearest(name, everything)}; `qbench list` shows them all")
    if as_json:
        print(json.dumps([_entry(p) | {"source": str(p.source), "options": _options(p)} for p in found], indent=1))
        return
    for plugin in found:
        print(f"{plugin.kind} {plugin.name}: {plugin.summary}")
        for key, value in plugin.attributes.items():
            if value not in (None, False):
                print(f"  {key.replace('_', ' ')}: {value}")
        print(f"  source: {plugin.source}")
        options = _options(plugin)
        print("  options:" if options else "  no options")
        for option in options:
            print(f"    {option['name']}: {option['type']} = {option['default']}")


def _options(plugin: Plugin) -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "type": _type(plugin.schema.model_json_schema()["properties"][name]),
            "default": "(required)" if info.is_required() else json.dumps(info.default),
        }
        for name, info in plugin.schema.model_fields.items()
    ]


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema as a person says it: `integer from 1 to 16`, `one of "tensor", "channel"`."""
    if "anyOf" in schema:
        return " or ".join(_type(form) for form in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    if "const" in schema:
        return json.dumps(schema["const"])
    low, high = (schema.get("minimum"), schema.get("maximum"))
    above, below = (schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum"))
    limits = [
        f"{word} {value}"
        for word, value in (("from", low), ("above", above), ("to", high), ("below", below))
        if value is not None
    ]
    if schema.get("type") == "array":
        items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of {_type(items)}"
    return " ".join([schema.get("type", "any"), *limits])
