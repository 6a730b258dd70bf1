"""Every built-in method passes the conformance kit; methods that break a promise do not."""

import pytest
import torch

from qbench import registry
from qbench.check import MODELS, check_method
from qbench.registry import parse, resolve

# What is run where the defaults take too long (training), or where further options are another path through the code.
REFERENCES = {
    "adaround": ["adaround[steps=5]", "adaround[bits=3,steps=5,granularity=tensor,symmetric=false]"],
    "activations": [
        "activations[mode=static]",
        "activations[mode=dynamic,granularity=token]",
        "activations[bits=4,matmuls=true,softmax=log_sqrt2]",
        "activations[placement=every_edge]",
    ],
    "adaquant": ["adaquant[steps=2]"],
    "apot_qat": ["apot_qat[steps=2,batch_size=16]"],
    "brevitas": ["brevitas", "brevitas[bits=4,rounding=gpfq,skip=[layer2,layer3,layer4,blocks]]"],
    "bireal": ["bireal[steps=2,batch_size=16]"],
    "bitat": ["bitat[steps=2,batch_size=16]", "bitat[steps=2,batch_size=16,activation_bits=1,share=0]"],
    "brecq": ["brecq[steps=2]"],
    "bwn": ["bwn[steps=2,batch_size=16]"],
    "cast": ["cast", "cast[dtype=float8_e5m2]"],
    "cpq": ["cpq[steps=2,batch_size=16]"],
    "deep_compression": ["deep_compression[steps=2,batch_size=16]"],
    "direct": ["direct[steps=2,batch_size=16]", "direct[bits=2,granularity=channel,steps=2,batch_size=16]"],
    "dorefa": ["dorefa[steps=2,batch_size=16]", "dorefa[bits=1,gradient_bits=6,unit=true,steps=2,batch_size=16]"],
    "dropbits": ["dropbits[steps=2,batch_size=16,penalty=0.1]"],
    "gptq": ["gptq", "gptq[bits=3,granularity=group,group_size=20,symmetric=false,act_order=true]"],
    "kmeans": ["kmeans", "kmeans[bits=2,granularity=channel]"],
    "kmeans_finetune": [
        "kmeans_finetune[steps=2,batch_size=16]",
        "kmeans_finetune[steps=2,batch_size=16,granularity=channel,assignments=redone,activation_bits=4]",
    ],
    "lsq": ["lsq[steps=2,batch_size=16]", "lsq[steps=2,batch_size=16,precision=bf16,ema=0.9]"],
    "lsq_plus": ["lsq_plus[steps=2,batch_size=16]"],
    "mixed": ["mixed[images=4,candidates=[6,3]]", "mixed[images=4,method=gptq,measure=fisher,solver=greedy,bits=3]"],
    "msq_preprocess": ["msq_preprocess[rows=4,skip=[layer3,layer4,blocks.3,blocks.4,blocks.5]]"],
    "msqe": [
        "msqe[steps=2,batch_size=16]",
        "msqe[estimator=gradient,granularity=channel,deviations=3.0,flatten=0.01,steps=2,batch_size=16]",
    ],
    "qa_ibp": ["qa_ibp[steps=2,batch_size=16]"],
    "qdrop": ["qdrop[steps=2,edge_bits=8]"],
    "minifloat": ["minifloat[granularity=group,group_size=20]", "minifloat[format=fp6_e2m3,calibration=mse]"],
    "mx": ["mx[edge_bits=8]", "mx[format=nvfp4]"],
    "obq": ["obq[skip=[layer2,layer3,layer4,blocks.3,blocks.4,blocks.5]]"],
    "pact": ["pact[steps=2,batch_size=16]", "pact[weights=sawb,steps=2,batch_size=16]"],
    "ort_static": ["ort_static", "ort_static[places=inputs,calibration=percentile]"],
    "product": ["product[bits=4,iterations=5]"],
    "ptq4vit": ["ptq4vit[candidates=5,images=8]", "ptq4vit[granularity=channel,metric=mse,candidates=3,images=8]"],
    "reactnet": ["reactnet[steps=2,batch_size=16]"],
    "rtn": ["rtn", "rtn[bits=3,granularity=group,group_size=16,symmetric=false,calibration=mse]"],
    "ste": ["ste[steps=2,batch_size=16]"],
    "ternary": ["ternary[steps=2,batch_size=16]", "ternary[steps=2,batch_size=16,kind=ttq,activation_bits=4]"],
    "widen_squeeze": ["widen_squeeze[steps=3,batch_size=16]"],
    "xnor": ["xnor[steps=2,batch_size=16]", "xnor[steps=2,batch_size=16,scale_map=false,edge_bits=null]"],
    "train": [f"train[steps=2,batch_size=16,precision={p}]" for p in ("float32", "bf16", "fp16")],
}
CASES = [case for name in sorted(registry._builtin("method")) for case in REFERENCES.get(name, [name])]

torch.set_num_threads(1)


def findings(reference, models=MODELS):
    return list(check_method(resolve("method", *parse(reference)), models))


@pytest.mark.parametrize("reference", CASES)
def test_built_in_methods(reference):
    checks = findings(reference)
    missing = [check.detail for check in checks if "is not installed" in check.detail]
    if missing:
        pytest.skip(missing[0])
    assert not [check for check in checks if not check.ok]
    for model in MODELS:
        own = [check.name for check in checks if check.name.startswith(f"{model}: ")]
        assert f"{model}: answers the same when loaded back" in own or f"{model}: supported" in own


BROKEN = """
import torch
from torch import nn
from qbench import Affine, Codebook, Unsupported, encode, method, weight_layers

def layer(model):
    return weight_layers(model)[-1]

@method("returns_nothing")
def returns_nothing(model, data):
    layer(model)

@method("raises")
def raises(model, data):
    return model.no_such_thing

@method("refuses")
def refuses(model, data):
    raise Unsupported("no reason")

@method("random")
def random(model, data):
    torch.seed()
    encode(layer(model), Codebook.nearest(layer(model).weight, torch.randn(4)))
    return model

@method("stateful")
def stateful(model, data, seen=[]):
    seen.append(0)
    encode(layer(model), Affine.nearest(layer(model).weight, 0.1 * len(seen), bits=4))
    return model

@method("overstated")
def overstated(model, data):
    code = Affine.nearest(layer(model).weight, 0.01, bits=8)
    encode(layer(model), Affine(code.codes, code.scale, -2, 1))
    return model

@method("changed_later")
def changed_later(model, data):
    encode(layer(model), Affine.nearest(layer(model).weight, 0.1, bits=4))
    layer(model).weight.data.add_(1e-4)
    return model

@method("unrecorded")
def unrecorded(model, data):
    last = [name for name, _ in model.named_modules() if _ is layer(model)][0]
    parent, _, child = last.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Sequential(layer(model)))
    return model

@method("unrecorded_function")
def unrecorded_function(model, data):
    layer(model).register_forward_hook(lambda m, i, o: o * 1.5)
    return model

@method("other_shape")
def other_shape(model, data):
    layer(model).register_forward_hook(lambda m, i, o: o[:, :3])
    return model

@method("halves")
def halves(model, data):
    layer(model).register_forward_hook(lambda m, i, o: o.half())
    return model

@method("explodes")
def explodes(model, data):
    layer(model).weight.data.fill_(float("nan"))
    return model

@method("touches_the_reference")
def touches_the_reference(model, data):
    layer(data.reference).weight.data.zero_()
    return model

@method("uses_labels")
def uses_labels(model, data):
    next(data.train.epoch(0, batch_size=4, seed=0))
    return model

@method("forgets", track="qat")
def forgets(model, data):
    from qbench.quant.schedule import Schedule
    from qbench.quant.training import fit
    seen = []
    def objective(net, x, y):
        seen.append(0)
        return data.loss(net(x), y) * len(seen)
    return fit(model, data, Schedule(steps=4, batch_size=16), objective=objective)

@method("not_the_same_function", track="structure")
def not_the_same_function(model, data):
    layer(model).weight.data.mul_(1.01)
    return model

@method("overwrites")
def overwrites(model, data):
    weight = layer(model).weight.data
    weight.copy_((weight / 0.1).round() * 0.1)
    return model
"""

PROMISES = {
    "returns_nothing": ("returns a module", "NoneType"),
    "raises": ("runs", "AttributeError: 'ResNet' object has no attribute 'no_such_thing'"),
    "random": ("deterministic under a seed", "weight"),
    "stateful": ("deterministic under a seed", "weight"),
    "overstated": ("claimed levels are true", "of 4"),
    "changed_later": ("weights are what their codes say", "weight"),
    "unrecorded": ("packs and loads back", ""),
    "unrecorded_function": ("answers the same when loaded back", ""),
    "other_shape": ("same output shape and type", "(8, 3) instead of"),
    "halves": ("same output shape and type", "float16"),
    "explodes": ("finite output", "NaN"),
    "touches_the_reference": ("only its model is changed", "data.reference"),
    "uses_labels": ("runs", "track='qat'"),
    "forgets": ("goes on to the same weights after a stop", "differ: "),
    "not_the_same_function": ("keeps the float function", "apart"),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugins") / "broken.py"
    path.write_text(BROKEN)
    registry.load_file(path)


@pytest.mark.parametrize("name", PROMISES)
def test_broken_promises_are_found(broken, name):
    promise, detail = PROMISES[name]
    failed = [check for check in findings(name, MODELS[:1]) if not check.ok]
    assert f"digits_resnet: {promise}" in [check.name for check in failed]
    assert any(detail in check.detail for check in failed)


def test_an_unsupported_model_is_said_to_be_so(broken):
    (check,) = findings("refuses", MODELS[:1])
    assert check.ok
    assert check.detail == "unsupported: no reason"


def test_a_method_that_only_overwrites_weights_passes(broken):
    assert all(check.ok for check in findings("overwrites", MODELS[:1]))
