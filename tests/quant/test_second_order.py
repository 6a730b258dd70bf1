"""GPTQ, OBQ and HQQ as solvers: the authors' answers, the plain recursions, and what theory guarantees."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qbench.errors import UserError
from qbench.methods.hqq import half_quadratic
from qbench.quant.brain_surgeon import surgeon
from qbench.quant.encodings import Affine
from qbench.quant.full_grids import Grid, Grids, Rounded
from qbench.quant.gram import grams
from qbench.quant.second_order import compensate

DAMP = 0.01


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "golden/baselines.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def case(seed: int, n: int, d: int, groups: int = 1, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Weights, and H of correlated inputs that are often 0, some always; float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    m = rows or 3 * d
    x = (draw(groups, m, d) + 0.7 * draw(groups, m, 1) + 0.5).relu()
    x[:, :, torch.rand(d, generator=generator) < 0.05] = 0
    return draw(groups, n, d), x.mT @ x


def values(rounded: Rounded) -> Tensor:
    """What the encoding decodes to, (groups, n, d)."""
    shape = rounded.codes.shape
    return rounded.encoding(torch.Size((shape[0] * shape[1], shape[2]))).decode().double().reshape(shape)


def error(weight: Tensor, got: Tensor, H: Tensor) -> float:
    return float(((weight - got) @ H * (weight - got)).sum())


def nearest(weight: Tensor, grids: Grids) -> Tensor:
    grid = grids.fit(weight)
    return grid.decode(grid.codes(weight))


@pytest.mark.parametrize("name", ["b3_asym", "b4_asym", "b3_sym", "b4_sym", "b4_asym_actorder", "b4_sym_actorder"])
def test_golden_gptq(golden: dict[str, Tensor], name: str) -> None:
    grids = Grids(int(name[1]), "_sym" in name, "minmax")
    act_order = name.endswith("actorder")
    rounded = compensate(golden["gptq_W"][None], golden["gptq_H"][None], grids, act_order=act_order, damp=DAMP)
    torch.testing.assert_close(rounded.scale[0, :, 0], golden[f"gptq_scale_{name}"], rtol=1e-5, atol=0)
    assert torch.equal(rounded.zero[0, :, 0], golden[f"gptq_zero_{name}"])
    if f"gptq_Q_{name}" in golden:
        got = rounded.encoding(golden["gptq_W"].shape).decode()
        torch.testing.assert_close(got, golden[f"gptq_Q_{name}"], rtol=1e-5, atol=1e-7)


def test_golden_hessians(golden: dict[str, Tensor]) -> None:
    """The reference of GPTQ counts the whole matrix of inputs as one sample, so its H is 2 X'X; that of OBQ is 2/n X'X.

    Neither factor changes what the weights are rounded to.
    """
    x, weight = golden["gptq_X"], golden["gptq_W"]
    layer = nn.Linear(16, 5, bias=False)
    layer.weight.data = weight
    H = grams(layer, [x]).H
    torch.testing.assert_close(2 * H[0].float(), golden["gptq_H"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(2 / len(x) * H[0], golden["obq_H"], rtol=1e-5, atol=1e-5)
    for solve, key in ((compensate, "gptq_Q_b3_asym"), (surgeon, "obq_Q_b3_asym")):
        got = solve(weight[None], H, Grids(3, False, "minmax"), damp=DAMP).encoding(weight.shape).decode()
        torch.testing.assert_close(got, golden[key], rtol=1e-5, atol=1e-7)


def test_golden_grid_of_least_error(golden: dict[str, Tensor]) -> None:
    grid = Grids(4, symmetric=False, calibration="mse24").fit(golden["gptq_W"])
    torch.testing.assert_close(grid.scale[:, 0], golden["gptq_mse24_scale_b4"], rtol=1e-5, atol=0)
    assert torch.equal(grid.zero[:, 0], golden["gptq_mse24_zero_b4"])


@pytest.mark.parametrize("damp", [0.0, DAMP])
def test_golden_obq(golden: dict[str, Tensor], damp: float) -> None:
    rounded = surgeon(golden["gptq_W"][None], golden["obq_H"][None], Grids(3, False, "minmax"), damp=damp)
    torch.testing.assert_close(rounded.scale[0, :, 0], golden["obq_scale_b3"], rtol=1e-5, atol=0)
    assert torch.equal(rounded.zero[0, :, 0], golden["obq_zero_b3"])
    got = rounded.encoding(golden["gptq_W"].shape).decode()
    torch.testing.assert_close(got, golden["obq_Q_b3_asym"], rtol=1e-5, atol=1e-7)


def test_golden_hqq(golden: dict[str, Tensor]) -> None:
    weight = golden["hqq_W"]
    scale, zero = half_quadratic(weight, 4, 64, iterations=0)
    torch.testing.assert_close(1 / scale, golden["hqq_scale0"], rtol=1e-5, atol=0)
    torch.testing.assert_close(zero, golden["hqq_zero0"], rtol=1e-5, atol=0)
    start = Affine.nearest(weight, scale, low=0, high=15, zero_point=zero)
    scale, zero = half_quadratic(weight, 4, 64)
    torch.testing.assert_close(1 / scale, golden["hqq_scale_b4"], rtol=1e-5, atol=0)
    torch.testing.assert_close(zero, golden["hqq_zero_b4"], rtol=1e-5, atol=0)
    got = Affine.nearest(weight, scale, low=0, high=15, zero_point=zero)
    assert torch.equal(got.codes.float(), golden["hqq_Wq_b4"].abs())
    errors = [float((coded.decode() - weight).abs().mean()) for coded in (start, got)]
    assert errors == pytest.approx([0.0024356, 0.0023893], abs=1e-7)


def plain_gptq(weight: Tensor, H: Tensor, grids: Grids, size: int, order: Tensor) -> Tensor:
    """The recursion of one group as it is written, (n, d); with an order, grids are found beforehand."""
    weight, d = weight.clone(), len(H)
    dead = H.diagonal() == 0
    H = H + torch.where(dead, torch.ones(()), DAMP * H.diagonal().mean()).diag()
    weight[:, dead] = 0
    U = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)
    sorted_ = torch.equal(order, torch.arange(d))
    grid = {start: grids.fit(weight[:, start : start + size]) for start in range(0, d, size)}
    quantized = torch.zeros_like(weight)
    for t, column in enumerate(order.tolist()):
        if sorted_ and t % size == 0:
            grid[t] = grids.fit(weight[:, t : t + size])
        own = grid[column // size * size]
        q = own.decode(own.codes(weight[:, column, None]))[:, 0]
        quantized[:, column] = q
        weight[:, order[t:]] -= ((weight[:, column] - q) / U[t, t])[:, None] * U[t, t:]
    return quantized


class WideGrids(Grids):
    """A little wider: the weight that sets a symmetric grid lies halfway between two codes, where sums in another order
    decide."""

    def _over(self, low: Tensor, high: Tensor) -> Grid:
        return super()._over(1.01 * low, 1.01 * high)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 4),
    d=st.integers(1, 160),
    groups=st.integers(1, 3),
    bits=st.integers(1, 6),
    symmetric=st.booleans(),
    size=st.sampled_from([None, 8, 50, 150]),
    act_order=st.booleans(),
)
def test_gptq_equals_the_plain_recursion(
    seed: int,
    n: int,
    d: int,
    groups: int,
    bits: int,
    symmetric: bool,
    size: int | None,
    act_order: bool,
) -> None:
    weight, H = case(seed, n, d, groups)
    grids = WideGrids(bits, symmetric, "minmax")
    rounded = compensate(weight, H, grids, group_size=size, act_order=act_order, damp=DAMP)
    for group in range(groups):
        order = torch.arange(d)
        if act_order:
            damped = H[group].diagonal() + torch.where(H[group].diagonal() == 0, 1.0, DAMP * H[group].diagonal().mean())
            order = damped.argsort(descending=True, stable=True)
        want = plain_gptq(weight[group], H[group], grids, size or d, order)
        torch.testing.assert_close(values(rounded)[group], want, rtol=1e-6, atol=1e-9)


def plain_obq(row: Tensor, H: Tensor, grids: Grids) -> Tensor:
    """One row, one weight at a time, (d,)."""
    dead = H.diagonal() == 0
    inverse = torch.linalg.inv(H + torch.where(dead, torch.ones(()), DAMP * H.diagonal().mean()).diag())
    row = row.masked_fill(dead, 0)
    grid = grids.fit(row[None])
    left, quantized = list(range(len(row))), torch.zeros_like(row)
    while left:
        wrong = row - grid.decode(grid.codes(row[None]))[0]
        costs = [float(wrong[j] ** 2 / inverse[j, j]) for j in left]
        j = left[int(np.argmin(costs))]
        if any(abs(wrong[i]) > grid.scale / 2 for i in left) and row[j] != 0:
            j = max(left, key=lambda i: abs(wrong[i]))
        quantized[j] = row[j] - wrong[j]
        row = row - inverse[j] * wrong[j] / inverse[j, j]
        inverse = inverse - inverse[:, j, None] * inverse[None, j] / inverse[j, j]
        left.remove(j)
    return quantized


@pytest.mark.parametrize(("n", "d", "groups"), [(2, 70, 1), (3, 9, 4), (1, 1, 2), (2, 33, 1)])
@pytest.mark.parametrize("bits", [2, 4])
def test_obq_equals_the_plain_recursion(n: int, d: int, groups: int, bits: int) -> None:
    weight, H = case(d, n, d, groups)
    grids = Grids(bits, symmetric=bits == 4, calibration="mse24")
    got = values(surgeon(weight, H, grids, damp=DAMP))
    want = [plain_obq(row, H[group], grids) for group in range(groups) for row in weight[group]]
    torch.testing.assert_close(got.flatten(0, 1), torch.stack(want), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_correlations_it_is_rounding(symmetric: bool) -> None:
    weight, _ = case(0, 5, 200)
    grids, H = Grids(4, symmetric, "minmax"), torch.eye(200, dtype=torch.float64)[None]
    want = nearest(weight, grids)
    for rounded in (compensate(weight, H, grids, damp=DAMP), surgeon(weight, H, grids, damp=DAMP)):
        torch.testing.assert_close(values(rounded), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_less_than_by_rounding(seed: int, bits: int) -> None:
    weight, H = case(seed, 8, 96, 2)
    grids = Grids(bits, True, "mse24")
    rounding = error(weight, nearest(weight, grids), H)
    gptq = error(weight, values(compensate(weight, H, grids, damp=DAMP)), H)
    ordered = error(weight, values(compensate(weight, H, grids, act_order=True, damp=DAMP)), H)
    obq = error(weight, values(surgeon(weight, H, grids, damp=DAMP)), H)
    assert max(gptq, ordered, obq) < 0.9 * rounding
    assert obq < 1.1 * gptq


@pytest.mark.parametrize(("bits", "d"), [(1, 10), (2, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_no_method_is_better_than_all_codes_tried(seed: int, bits: int, d: int) -> None:
    """The best of all 2**(bits d) roundings bounds each from below, and they come near it."""
    weight, H = case(seed, 4, d, rows=200)
    H[0] += 0.1 * torch.eye(d)
    grids = Grids(bits, False, "minmax")
    grid = grids.fit(weight)
    codes = torch.tensor(list(product(range(2**bits), repeat=d)), dtype=torch.float64)
    tried = weight.movedim(0, 1) - Grid(grid.scale.movedim(0, 1), grid.zero.movedim(0, 1), bits).decode(codes)
    best = float(torch.einsum("nki,ij,nkj->nk", tried, H[0], tried).amin(1).sum())
    found = [
        error(weight, values(rounded), H)
        for rounded in (compensate(weight, H, grids, damp=DAMP), surgeon(weight, H, grids, damp=DAMP))
    ]
    rounding = error(weight, nearest(weight, grids), H)
    assert all(best * (1 - 1e-6) <= each <= rounding for each in found)


def test_inputs_without_energy() -> None:
    """Dead inputs get the code of 0 and change nothing else; a layer without any live input becomes 0."""
    weight, H = case(1, 3, 40)
    H[:, 7] = H[:, :, 7] = 0
    grids = Grids(3, False, "minmax")
    for solve in (compensate, surgeon):
        got = values(solve(weight, H, grids, damp=DAMP))
        assert (got[..., 7] == 0).all()
        other = weight.clone()
        other[..., 7] = 0.01
        assert torch.equal(got, values(solve(other, H, grids, damp=DAMP)))
        assert (values(solve(weight, torch.zeros_like(H), grids, damp=DAMP)) == 0).all()
        assert (values(solve(torch.zeros_like(weight), H, grids, damp=DAMP)) == 0).all()


def test_one_sample_needs_damping() -> None:
    weight, H = case(2, 3, 20, rows=1)
    grids = Grids(4, True, "minmax")
    for solve in (compensate, surgeon):
        got = values(solve(weight, H, grids, damp=DAMP))
        assert error(weight, got, H) < error(weight, nearest(weight, grids), H)
        with pytest.raises(UserError, match="damp"):
            solve(weight, H, grids, damp=0.0)


def test_hqq_groups() -> None:
    """A ragged group is the group it is; groups of equal numbers are exact; the start is never left for the worse."""
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    rows[:, 32:40], rows[2, 48:] = 0.3, 1.5
    scale, zero = half_quadratic(rows, 3, 8)
    assert scale.shape == zero.shape == (6, 7)
    assert scale[0, 6] == pytest.approx(float(rows[0, 48:].max() - rows[0, 48:].min()) / 7)
    decoded = Affine.nearest(rows, scale, low=0, high=7, zero_point=zero, group_size=8).decode()
    torch.testing.assert_close(decoded[:, 32:40], rows[:, 32:40], rtol=1e-5, atol=0)
    torch.testing.assert_close(decoded[2, 48:], rows[2, 48:], rtol=1e-5, atol=0)
    first = half_quadratic(rows, 3, 8, iterations=0)
    start = Affine.nearest(rows, first[0], low=0, high=7, zero_point=first[1], group_size=8).decode()
    assert (decoded - rows).abs().mean() < (start - rows).abs().mean()
