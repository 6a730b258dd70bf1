"""What the metrics of a row come to: numbers are averaged over its seeds, samples pooled. Pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qbench import profiles
from qbench.metrics.ratio import paired_ratio, quantile
from qbench.run import Measurement, Result
from qbench.stats import Interval


def judge_metrics(scored: list[Result]) -> tuple[dict[str, Any], dict[str, str]]:
    """The cells of a row, and why a metric was not measured.

    A metric that is there several times, with other options, has its cells under their own names once, and then with
    its options behind them.
    """
    weights, inputs = (scored[0].bits.get(key) for key in ("weights", "activations"))
    cells: dict[str, Any] = {"weight_bits": weights, "activation_bits": inputs}
    toolkits = [r.records["toolkit"] for r in scored if "toolkit" in r.records]
    if toolkits:
        cells["toolkit"] = ", ".join(dict.fromkeys(f"{tool['name']} {tool['version']}" for tool in toolkits))
    notes: dict[str, str] = {}
    judged: set[str] = set()
    for name in dict.fromkeys(name for r in scored for name in r.metrics):
        measured = [r.metrics[name] for r in scored if name in r.metrics]
        good = [m for m in measured if m.status == "ok"]
        if not good:
            notes[name] = _reason(measured[0])
            continue
        plain, _, _ = name.partition("[")
        found = _JUDGES[plain]([m.values for m in good]) if plain in _JUDGES else _value(name, good)
        suffix = name[len(plain) :] if plain in judged and plain in _JUDGES else ""
        cells |= {key + suffix: value for key, value in found.items()}
        judged.add(plain)
    return cells, notes


def _reason(measurement: Measurement) -> str:
    text = (measurement.error or "").splitlines()
    word = "" if measurement.status == "unsupported" else f"{measurement.status}: "
    return word + (text[0] if text else "no reason given")


def _value(name: str, measured: list[Measurement]) -> dict[str, Any]:
    """A metric that qbench does not know: the mean of its `value`."""
    values = [m.values["value"] for m in measured if isinstance(m.values.get("value"), (int, float))]
    return {f"{name} ({measured[0].unit})": float(np.mean(values))} if values else {}


Values = list[dict[str, Any]]


def _mean(values: Values, key: str) -> float:
    return float(np.mean([v[key] for v in values]))


def size_cells(values: Values) -> dict[str, Any]:
    """Bytes of the artifact and of other forms of the network, and the artifact's compression."""
    file_bytes = _mean(values, "file_bytes")
    return {
        "file_bytes": file_bytes,
        "packed_bytes": _mean(values, "packed_bytes"),
        "nominal_bytes": _mean(values, "nominal_bytes"),
        "compression_ratio": _mean(values, "float_bytes") / file_bytes,
        **{f"{name}_bytes": float(np.mean(sizes)) for name, sizes in _other_sizes(values).items()},
    }


def _other_sizes(values: Values) -> dict[str, list[float]]:
    """Of gzip, of a coder of codes that reaches their entropy, and of other formats, where they were measured."""
    found = {"gzip": [v["gzip_bytes"] for v in values if "gzip_bytes" in v]}
    coded = [v for v in values if "coding" in v]
    saved = [(v["covered_nominal_bits"] - v["coding"]["entropy_bits"]) / 8 for v in coded]
    found["entropy_coded"] = [v["packed_bytes"] - less for v, less in zip(coded, saved, strict=True)]
    for name in {name for v in values for name in v.get("formats", {})}:
        found[name] = [v["formats"][name]["bytes"] for v in values if "bytes" in v["formats"][name]]
    return {name: sizes for name, sizes in found.items() if sizes}


def _coverage(values: Values) -> dict[str, Any]:
    return {
        "weights_covered": _mean(values, "weights_quantized") / _mean(values, "weights_total"),
        "macs_covered": _mean(values, "macs_weights") / _mean(values, "macs_total"),
        "macs_covered_with_inputs": _mean(values, "macs_both") / _mean(values, "macs_total"),
    }


def _cost(values: Values) -> dict[str, Any]:
    return {
        "cost_seconds": _mean(values, "seconds"),
        "cost_peak_memory_bytes": _mean(values, "peak_memory_bytes"),
        "cost_images": _mean(values, "images"),
    }


def _pooled(values: Values, key: str) -> list[float]:
    return [sample for v in values for sample in v[key]]


def _latency(values: Values) -> dict[str, Any]:
    """Median milliseconds, and the paired ratio to float; unstable where float does not even agree with itself."""
    judged: dict[str, Any] = {"float_latency_ms": 1000 * float(np.median(_pooled(values, "float")))}
    judged["latency_noise"] = Interval(*paired_ratio(_pooled(values, "float_again"), _pooled(values, "float")))
    if "quantized" in values[0]:
        quantized, reference = (_pooled(values, name) for name in ("quantized", "float"))
        judged["latency_ms"] = 1000 * float(np.median(quantized))
        for percent in (90, 99):
            if (seconds := quantile(quantized, percent / 100)) is not None:
                judged[f"latency_p{percent}_ms"] = 1000 * seconds
        judged["latency_ratio"] = Interval(*paired_ratio(quantized, reference))
        judged["latency_ratio_unstable"] = abs(judged["latency_noise"].estimate - 1) > _NOISE
        judged["latency_ratio_saturates"] = any(v.get("saturates", False) for v in values)
        judged["integer_layers"] = f"{values[0]['integer_layers']}/{values[0]['compute_layers']}"
        judged["latency_runtime"] = values[0]["runtime"]
    return judged


def _throughput(values: Values) -> dict[str, Any]:
    """Images per second at the median batch, and how many times float's, paired."""
    size = values[0]["batch_size"]
    reference = _pooled(values, "float")
    judged: dict[str, Any] = {"float_images_per_second": size / float(np.median(reference))}
    if "quantized" in values[0]:
        quantized = _pooled(values, "quantized")
        judged["images_per_second"] = size / float(np.median(quantized))
        judged["throughput_ratio"] = Interval(*paired_ratio(reference, quantized))
    return judged


def _memory(values: Values) -> dict[str, Any]:
    judged = {"float_memory_bytes": float(np.mean([v["float"]["peak"] for v in values]))}
    if "quantized" in values[0]:
        judged["memory_bytes"] = float(np.mean([v["quantized"]["peak"] for v in values]))
    return judged


_NOISE = 0.05
"""Share by which two instances of the float network may differ before a latency is called unstable."""


def _training_time(values: Values) -> dict[str, Any]:
    """Paired ratio of a training step to a float one, and the reduction it means: negative is slower."""
    quantized, reference = _pooled(values, "quantized"), _pooled(values, "float")
    ratio = Interval(*paired_ratio(quantized, reference))
    seconds = float(np.median(quantized))
    return {
        "step_ratio": ratio,
        "step_seconds": seconds,
        "epoch_seconds": seconds * values[0]["steps_per_epoch"],
        "training_time_reduction_percent": 100 * (1 - ratio.estimate),
        "training_memory_ratio": values[0]["saved_bytes"]["quantized"] / values[0]["saved_bytes"]["float"],
    }


def _energy(values: Values) -> dict[str, Any]:
    from qbench.metrics.energy import millijoules  # here, because it takes torch along

    rounds = [millijoules(v["windows"]) for v in values]
    name = "quantized" if "quantized" in rounds[0] else "float"
    judged: dict[str, Any] = {"energy_mj": float(np.median([e for r in rounds for e in r[name]]))}
    if name == "quantized":
        quantized, reference = ([e for r in rounds for e in r[key]] for key in ("quantized", "float"))
        judged["energy_ratio"] = Interval(*paired_ratio(quantized, reference))
    return judged


def _operations(values: Values) -> dict[str, Any]:
    """By a model of a chip: never to be mixed with what was measured."""
    own, reference = (sum(values[0][key].values()) for key in ("picojoules", "float_picojoules"))
    return {
        "bops": values[0]["bops"],
        "bops_ratio": values[0]["bops"] / values[0]["float_bops"],
        "modelled_energy_uj": own / 1e6,
        "modelled_energy_ratio": own / reference,
    }


def _roofline(values: Values) -> dict[str, Any]:
    if "quantized" not in values[0]:
        return {}
    expected = [v["expected"]["quantized"]["seconds"] / v["expected"]["float"]["seconds"] for v in values]
    achieved = paired_ratio(_pooled(values, "quantized"), _pooled(values, "float"))
    return {"roofline_ratio": float(np.mean(expected)), "roofline_achieved_ratio": Interval(*achieved)}


def _placement(values: Values) -> dict[str, Any]:
    """The profiles of hardware that can execute it."""
    fitting = [name for name in profiles.names() if not profiles.violations(profiles.load(name), values[0])]
    return {"fits": ", ".join(fitting) or "none"}


_JUDGES: dict[str, Callable[[Values], dict[str, Any]]] = {
    "size": size_cells,
    "coverage": _coverage,
    "cost": _cost,
    "latency": _latency,
    "throughput": _throughput,
    "memory": _memory,
    "training_time": _training_time,
    "energy": _energy,
    "placement": _placement,
    "operations": _operations,
    "roofline": _roofline,
    # The task's metric is judged with its interval above.
    "top1": lambda _: {},
    "parity": lambda _: {},  # judged with its outcomes, in `qbench.deployed`
    "map": lambda values: {key: _mean(values, key) for key in ("AP50", "AP75") if values[0][key] is not None},
}
