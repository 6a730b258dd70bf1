"""Coded artifacts load back bit for bit, are smaller, and say when they are damaged."""

import dataclasses

import pytest
import safetensors.torch
import torch

from qbench.errors import Unsupported, UserError
from qbench.metrics.size import _coding
from qbench.quant import packing
from qbench.quant.encodings import Affine, Cast, Codebook, Rotated, Sum, VectorCodebook, coded, leaves, restore
from qbench.quant.layers import encode, encodings, named_weight_layers, weight_layers
from qbench.registry import parse, resolve

CODERS = ["huffman", "rans", "hac", "shac", "csr"]


class Data:
    seed = 0

    def record(self, name, values):
        self.recorded = (name, values)


def quantized(*steps):
    model = resolve("model", "digits_resnet")().load()
    for step in steps:
        model = resolve("method", *parse(step))(model, Data())
    return model


def packed(model, path):
    return packing.pack(model, path, packing.Origin("digits_resnet", {}))


@pytest.mark.parametrize("coder", CODERS)
def test_artifacts_load_back(coder, tmp_path):
    plain = packed(quantized("rtn[bits=5]"), tmp_path / "plain.safetensors")
    model = quantized("rtn[bits=5]", f"compress[coder={coder}]")
    sizes = packed(model, tmp_path / "a.safetensors")
    loaded = packing.load(tmp_path / "a.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert {e.coder for e in encodings(loaded).values()} == {coder}
    assert sizes.nominal_bits == plain.nominal_bits
    codes = sum(e.codes.numel() for e in encodings(model).values())
    if coder in ("huffman", "rans", "hac"):
        assert sizes.packed_bytes < plain.packed_bytes - 0.05 * codes * 5 / 8
    else:
        assert sizes.packed_bytes <= plain.packed_bytes + 5 * len(encodings(model))


def test_nothing_but_storage_changes():
    model, data = quantized("rtn[bits=4]"), Data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = resolve("method", *parse("compress"))(model, data)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert data.recorded == ("compress", {"coder": "rans", "tensors": len(weight_layers(model))})


def test_nothing_to_compress():
    with pytest.raises(Unsupported, match="quantize in a step before"):
        quantized("compress")
    with pytest.raises(Unsupported, match="no weight has codes"):
        quantized("cast", "compress")


@pytest.mark.parametrize("coder", CODERS)
def test_every_encoding_with_codes(coder):
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    affine = Affine.nearest(weight, 0.4, low=-5, high=6, zero_point=1.0, group_size=7)
    book = Codebook.nearest(weight, torch.linspace(-2, 2, 9), scale=weight.abs().amax(1) / 3)
    vectors = VectorCodebook(torch.randint(0, 20, (64, 8)), torch.randn(20, 4), (64, 32))
    whole = Sum((affine, Rotated(Sum((book, vectors)), torch.eye(32)), Cast(weight.half())))
    marked = coded(whole, coder)
    back = restore(marked.meta(), marked.tensors())
    assert torch.equal(back.decode(), whole.decode())
    assert [getattr(leaf, "coder", None) for leaf in leaves(back)] == [coder] * 3 + [None]


def test_a_damaged_stream_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    packed(quantized("rtn[bits=4]", "compress"), path)
    header, tensors = packing.read(path)
    name = next(key for key in tensors if key.startswith("code:") and key.endswith(":codes"))
    tensors[name][len(tensors[name]) // 2] ^= 4
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=rf"a\.safetensors: {name.split(':')[1]} cannot be decoded: the rans stream"):
        packing.load(path)
    assert "coder" in header["encodings"][name.split(":")[1]]


def test_bounds_of_the_size_metric(tmp_path):
    model = quantized("kmeans[bits=4]")
    with torch.no_grad():
        for layer in named_weight_layers(model).values():
            code = encodings(layer)["weight"]
            levels = code.levels.clone()
            levels[..., 0] = 0
            encode(layer, dataclasses.replace(code, levels=levels))
    found = _coding(list(encodings(model).values()))
    weights = [layer.weight for layer in weight_layers(model)]
    count = sum(weight.numel() for weight in weights)
    assert found["zeros"] == sum(int((weight == 0).sum()) for weight in weights)
    assert 0 < found["mask_bits"] < found["entropy_bits"] <= found["huffman_bits"] < found["entropy_bits"] + count
    assert found["hac_bits"] > found["huffman_bits"]
    plain = packed(model, tmp_path / "a.safetensors").packed_bytes
    model = resolve("method", *parse("compress"))(model, Data())
    saved = 8 * (plain - packed(model, tmp_path / "a.safetensors").packed_bytes)
    assert saved == pytest.approx(4 * count - found["entropy_bits"], rel=0.1)
