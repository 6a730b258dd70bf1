"""SPFQ's solvers: the authors' answers, the direct recursion, and what theory guarantees."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbench.errors import Unsupported
from qbench.quant import alphabet as alphabets
from qbench.quant.path_following import align, follow_path, squared_error
from qbench.quant.stochastic import stochastic_path

C = 1.16


def tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def split(values: Tensor, groups: int) -> Tensor:
    return values.reshape(len(values), groups, -1).movedim(1, 0)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "golden/gpfq_spfq.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.parametrize(("order", "bits"), [(1, 3), (2, 3), (2, 4)])
def test_golden(golden: dict[str, Tensor], order: int, bits: int) -> None:
    w, x, xt = golden["W"], golden["X"], golden["Xt"]
    H, G, F = (xt.T @ xt)[None], (xt.T @ x)[None], (x.T @ x)[None]
    aligned = align(w[None], H, G, order)
    step = C * alphabets.radius(w if order == 1 else aligned[0]) / 2 ** (bits - 1)
    if order == 2:
        torch.testing.assert_close(aligned[0], golden["spfq_Walign_r2"], rtol=0, atol=1e-10)
        torch.testing.assert_close((w @ x.T) - aligned[0] @ xt.T, golden["spfq_Ualign_r2"], rtol=0, atol=1e-10)
    if (order, bits) == (2, 3):
        torch.testing.assert_close(step, golden["spfq_step_r2_b3"], rtol=1e-12, atol=0)
    codes, _ = stochastic_path(aligned, H, step, golden["spfq_uniforms"].T[None], bits)
    q = codes * step
    torch.testing.assert_close(q[0], golden[f"spfq_Q_r{order}_b{bits}"], rtol=0, atol=1e-10)
    error, energy = squared_error(w[None], q, H, G, F)
    norms = torch.stack([error.sqrt(), (error / energy).sqrt()]).flatten()
    torch.testing.assert_close(norms, golden[f"spfq_err_r{order}_b{bits}"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_golden_of_the_deterministic_quantizer(golden: dict[str, Tensor], order: int) -> None:
    w, x, xt = golden["W"], golden["X"], golden["Xt"]
    H = (xt.T @ xt)[None]
    aligned = align(w[None], H, (xt.T @ x)[None], order)
    alphabet = alphabets.uniform(C * alphabets.radius(w if order == 1 else aligned[0]) / 4, 3)
    q = alphabet.levels[follow_path(aligned, H, H, alphabet).indices[0]]
    torch.testing.assert_close(q, golden[f"align_det_Q_r{order}_b3"], rtol=0, atol=1e-10)


def direct(
    weight: Tensor, x: Tensor, xt: Tensor, order: int, step: float, uniforms: Tensor, top: int | None
) -> tuple[Tensor, Tensor]:
    """Both phases as the paper has them, for one neuron: w~ and q."""
    d = len(weight)
    norms = xt.square().sum(0)
    aligned, error = torch.zeros_like(weight), torch.zeros_like(x[:, 0])
    for sweep in range(order):
        for t in range(d):
            error = error + (weight[t] * x[:, t] if sweep == 0 else aligned[t] * xt[:, t])
            aligned[t] = xt[:, t] @ error / norms[t] if norms[t] > 0 else 0
            error = error - aligned[t] * xt[:, t]
    chosen, error = torch.zeros_like(weight), torch.zeros_like(x[:, 0])
    for t in range(d):
        a = aligned[t] + (xt[:, t] @ error / norms[t] if norms[t] > 0 else 0)
        below = torch.floor(a / step)
        code = below if uniforms[t] < 1 - (a / step - below) else below + 1
        chosen[t] = (code if top is None else code.clamp(-top, top)) * step
        error = error + (aligned[t] - chosen[t]) * xt[:, t]
    return aligned, chosen


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 3),
    d=st.integers(1, 80),
    m=st.integers(1, 30),
    groups=st.integers(1, 3),
    order=st.integers(1, 4),
    bits=st.one_of(st.none(), st.integers(1, 6)),
)
def test_equals_the_direct_recursion(
    seed: int, n: int, d: int, m: int, groups: int, order: int, bits: int | None
) -> None:
    """Groups have their own columns, in both phases; some columns are dead."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, x = draw(groups, n, d), draw(m, groups * d)
    xt = x + 0.3 * draw(m, groups * d)
    xt[:, torch.rand(groups * d, generator=generator) < 0.1] = 0
    uniforms = torch.rand(groups, n, d, generator=generator, dtype=torch.float64)
    own, own_t = split(x, groups), split(xt, groups)
    H, G = own_t.mT @ own_t, own_t.mT @ own
    aligned = align(weight, H, G, order)
    codes, values = stochastic_path(aligned, H, tensor(0.3), uniforms, bits)
    assert values.shape == codes.shape == weight.shape
    top = None if bits is None else 2 ** (bits - 1)
    for group in range(groups):
        for neuron in range(n):
            case = (weight[group, neuron], own[group], own_t[group], order, 0.3, uniforms[group, neuron], top)
            fitted, chosen = direct(*case)
            torch.testing.assert_close(aligned[group, neuron], fitted, rtol=1e-7, atol=1e-7)
            # The same draws and the same values but for their last digits: no code differs.
            torch.testing.assert_close(codes[group, neuron].double() * 0.3, chosen, rtol=0, atol=1e-9)


def test_more_passes_fit_better() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 60, generator=generator, dtype=torch.float64)
    xt = x + 0.3 * torch.randn(20, 60, generator=generator, dtype=torch.float64)
    w = torch.randn(1, 3, 60, generator=generator, dtype=torch.float64)
    H, G, F = ((a.T @ b)[None] for a, b in ((xt, xt), (xt, x), (x, x)))
    errors = [float(squared_error(w, align(w, H, G, order), H, G, F)[0]) for order in (1, 2, 5, 20)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


def test_alignment_in_the_order_of_energy_is_alignment_of_sorted_columns() -> None:
    x = torch.randn(20, 30, dtype=torch.float64)
    xt = x + 0.3 * torch.randn(20, 30, dtype=torch.float64)
    w = torch.randn(1, 3, 30, dtype=torch.float64)
    order = xt.square().sum(0).argsort(descending=True)
    by_hand = align(w[..., order], (xt.T @ xt)[None][:, order][..., order], (xt.T @ x)[None][:, order][..., order], 2)
    got = align(w, (xt.T @ xt)[None], (xt.T @ x)[None], 2, act_order=True)
    torch.testing.assert_close(got[..., order], by_hand)


def test_rounding_has_no_bias_and_stays_next_to_the_value() -> None:
    """A single column: the code's mean is the value, and it is one of the two levels next to it."""
    value = torch.linspace(-2.4, 2.4, 25, dtype=torch.float64).expand(1000, 25)[..., None]
    uniforms = ((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)[:, None, None].expand(value.shape)
    codes, _ = stochastic_path(value, torch.ones(1000, 1, 1, dtype=torch.float64), tensor(1.0), uniforms, None)
    torch.testing.assert_close(codes.double().mean(0), value[0], rtol=0, atol=2e-3)
    assert ((codes - value).abs() < 1).all()
    # The variance of the error is at most a quarter of the step's square.
    assert ((codes - value).square().mean(0) <= 0.2501).all()


def test_the_likely_bound_holds() -> None:
    """`max |X w - X q| <= delta sqrt(2 pi p log d) max ||X_t||` with p = 2, with room to spare."""
    m, d, step, worst = 16, 128, 0.5, 0.0
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(m, d, generator=generator, dtype=torch.float64)
        w = torch.rand(1, 8, d, generator=generator, dtype=torch.float64) * 2 - 1
        uniforms = torch.rand(1, 8, d, generator=generator, dtype=torch.float64)
        codes, _ = stochastic_path(w, (x.T @ x)[None], tensor(step), uniforms, None)
        error = ((w - codes * step)[0] @ x.T).abs().max()
        bound = step * math.sqrt(2 * math.pi * 2 * math.log(d)) * x.norm(dim=0).max()
        worst = max(worst, float(error / bound))
    assert 0.05 < worst < 0.3


def test_an_alphabet_without_end_has_one() -> None:
    ones = torch.ones(1, 1, 1, dtype=torch.float64)
    with pytest.raises(Unsupported, match="16 bits"):
        stochastic_path(1e6 * ones, ones, tensor(1.0), 0.5 * ones, None)
