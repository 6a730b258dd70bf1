"""Artifacts: one quantized model in one safetensors file, written at true bit widths and loaded back without pickle."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qbench import registry
from qbench.errors import UserError
from qbench.quant import activations, structure
from qbench.quant.coding import DamagedError
from qbench.quant.encodings import Codebook, Encoding, restore, to_rows
from qbench.quant.layers import encode, encodings, full_name, named_weight_layers, output_axis

SCHEMA = 1


@dataclass(frozen=True)
class Origin:
    """The model plugin that builds the architecture, and the plugin files that define it."""

    model: str
    options: Mapping[str, Any]
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sizes:
    """Bits and bytes of one artifact; nominal counts codes only, packed all tensors, file everything on disk."""

    nominal_bits: float
    packed_bytes: int
    file_bytes: int
    weights: int
    """Numbers in all parameters of the network."""


def pack(model: nn.Module, path: Path, origin: Origin, reference: Mapping[str, Tensor] | None = None) -> Sizes:
    """Write the model to `path`.

    Args:
        model: with encodings attached.
        path: of the safetensors file; written whole or not at all.
        origin: how `load` rebuilds the architecture.
        reference: the float model's state dict. A weight that differs from it and has no encoding is stored as a
            codebook where its rows have few distinct values, else as float.

    Raises:
        ValueError: a weight is not what its codes say.
    """
    attached = encodings(model) | (infer(model, reference) if reference is not None else {})
    state = model.state_dict()
    shared = _shared(state, prefer=attached.keys())
    tensors = {f"float:{name}": value for name, value in state.items() if name not in attached and name not in shared}
    for name, encoding in attached.items():
        if not torch.equal(encoding.decode().to(state[name]), state[name]):
            raise ValueError(f"{name} no longer equals its decoded codes: it was changed after it was encoded")
        if name not in shared:
            tensors |= {f"code:{name}:{key}": value for key, value in encoding.tensors().items()}
    attached = {name: encoding for name, encoding in attached.items() if name not in shared}
    header = {
        "schema": SCHEMA,
        "origin": asdict(origin),
        "structure": structure.record(model),
        "encodings": {name: encoding.meta() for name, encoding in attached.items()},
        "quantizers": {name: activations.describe(q) for name, q in activations.input_quantizers(model).items()},
        "shared": shared,
    }
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    partial = path.with_suffix(".partial")
    safetensors.torch.save_file(contiguous, partial, metadata={"qbench": json.dumps(header)})
    partial.replace(path)
    float_bits = sum(v.numel() * v.element_size() * 8 for k, v in contiguous.items() if k.startswith("float:"))
    return Sizes(
        nominal_bits=float_bits + sum(encoding.nominal_bits for encoding in attached.values()),
        packed_bytes=sum(value.numel() * value.element_size() for value in contiguous.values()),
        file_bytes=path.stat().st_size,
        weights=sum(parameter.numel() for parameter in model.parameters()),
    )


def _shared(state: Mapping[str, Tensor], prefer: Collection[str]) -> dict[str, str]:
    """Names of tensors that are the same memory as another: the name that is stored, one with codes if there is one."""
    first: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    for name in sorted(state, key=lambda name: name not in prefer):
        value = state[name]
        where = (value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride())
        if value.numel() and where in first:
            shared[name] = first[where]
        else:
            first[where] = name
    return shared


def infer(model: nn.Module, reference: Mapping[str, Tensor]) -> dict[str, Encoding]:
    """Codebooks for weights that a method overwrote without attaching an encoding: lossless, or not at all.

    A row's levels are counted; where all rows have at most 256, and codes and levels are smaller than the floats, the
    weight is stored so.
    """
    attached = encodings(model)
    found: dict[str, Encoding] = {}
    for name, layer in named_weight_layers(model).items():
        key = full_name(name, "weight")
        weight = layer.weight
        assert isinstance(weight, Tensor)
        changed = key not in reference or not torch.equal(reference[key].to(weight), weight)
        if key in attached or not changed or weight.dtype != torch.float32:
            continue
        axis = output_axis(layer)
        rows = to_rows(weight.detach(), axis)
        ordered = rows.sort(dim=1).values
        fresh = torch.ones_like(ordered, dtype=torch.bool)
        fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        rank = fresh.cumsum(1) - 1
        k = int(rank.max()) + 1
        if k > 256:
            continue
        # Unused levels repeat the row's largest value, so that each row stays sorted.
        levels = ordered[:, -1:].repeat(1, k).scatter_(1, rank, ordered)
        codebook = Codebook.nearest(weight.detach(), levels[:, None], axis=axis)
        smaller = sum(t.numel() * t.element_size() for t in codebook.tensors().values()) < weight.numel() * 4
        # Bit for bit: a codebook has one zero, and a weight may be -0.
        if smaller and torch.equal(codebook.decode().view(torch.int32), weight.detach().view(torch.int32)):
            found[key] = codebook
    return found


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of an artifact.

    Raises:
        UserError: the file is missing, damaged, or not an artifact.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {error}") from error
    if "qbench" not in metadata:
        raise UserError(f"{path} is a safetensors file, but not a qbench artifact")
    header: dict[str, Any] = json.loads(metadata["qbench"])
    if header["schema"] != SCHEMA:
        raise UserError(f"{path} has artifact schema {header['schema']}; this qbench reads {SCHEMA}")
    return header, tensors


def load(path: str | Path) -> nn.Module:
    """The model of an artifact, rebuilt from the architecture, the structure and the codes; in evaluation mode.

    Raises:
        UserError: the file is missing or damaged, or the plugin that builds its architecture is.
    """
    header, tensors = read(path)
    for plugin in header["origin"]["plugins"]:
        registry.load_file(plugin, where=str(path))
    origin = registry.resolve("model", header["origin"]["model"], header["origin"]["options"], where=str(path))
    model: nn.Module = origin().build()
    structure.replay(model, header["structure"])
    for name, description in header["quantizers"].items():
        activations.quantize_input(model.get_submodule(name), activations.build(description))
    by_name: dict[str, dict[str, Tensor]] = {}
    floats: dict[str, Tensor] = {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(":")
        if kind == "float":
            floats[rest] = value
        else:
            name, _, part = rest.rpartition(":")
            by_name.setdefault(name, {})[part] = value
    decoded = {name: _restore(path, name, meta, by_name[name]) for name, meta in header["encodings"].items()}
    state = floats | {name: encoding.decode() for name, encoding in decoded.items()}
    state |= {name: state[source] for name, source in header["shared"].items()}
    _tie(model, header["shared"])
    model.load_state_dict(state, assign=False)
    decoded |= {name: decoded[source] for name, source in header["shared"].items() if source in decoded}
    for name, encoding in decoded.items():
        layer, _, parameter = name.rpartition(".")
        encode(model.get_submodule(layer), encoding, parameter)
    return model.eval()


def _restore(path: str | Path, name: str, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Encoding:
    try:
        return restore(meta, tensors)
    except DamagedError as error:
        raise UserError(f"{path}: {name} cannot be decoded: {error}; write the artifact again") from error


def _tie(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Make parameters that were one tensor one tensor again."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, source in shared.items():
        if name in parameters and source in parameters and parameters[name] is not parameters[source]:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameters[source])
