"""GPFQ in Gram form: the authors' answers, the direct recursion, and what theory guarantees."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qbench.errors import UserError
from qbench.quant import alphabet as alphabets
from qbench.quant.alphabet import Alphabet
from qbench.quant.path_following import follow_path, squared_error

C = 1.16


def by_gram(weight: Tensor, x: Tensor, xt: Tensor, alphabet: Alphabet, groups: int = 1, **options: bool) -> Tensor:
    """Levels, (N, d), through the production solver; x and xt are (m, groups * d)."""
    split = [value.reshape(len(value), groups, -1).movedim(1, 0) for value in (xt, x)]
    shaped = weight.reshape(groups, -1, weight.shape[1])
    index = follow_path(shaped, split[0].mT @ split[0], split[0].mT @ split[1], alphabet, **options).indices
    return level(alphabet, index.reshape(weight.shape))


def level(alphabet: Alphabet, index: Tensor) -> Tensor:
    return alphabet.levels[index] if alphabet.levels.dim() == 1 else alphabet.levels.gather(1, index)


def direct(weight: Tensor, x: Tensor, xt: Tensor, quantize, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The recursion as the paper has it, neuron by neuron: levels (N, d), and the error (N, m)."""
    n, d = weight.shape
    chosen, errors = torch.zeros_like(weight), []
    for neuron in range(n):
        first = neuron * groups // n * d
        u = torch.zeros(len(x), dtype=weight.dtype)
        for t in range(d):
            v = u + weight[neuron, t] * x[:, first + t]
            column = xt[:, first + t]
            a = column @ v / (column @ column) if column.any() else torch.zeros((), dtype=weight.dtype)
            chosen[neuron, t] = quantize(a, neuron)
            u = v - chosen[neuron, t] * column
        errors.append(u)
    return chosen, torch.stack(errors)


def msq(step: float, top: int):
    return lambda a, _: torch.floor(a / step + 0.5).clamp(-top, top) * step


def soft(a: Tensor, threshold: float) -> Tensor:
    return a.sign() * (a.abs() - threshold).clamp(min=0)


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "golden/gpfq_spfq.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@pytest.mark.parametrize("bits", [3, 4])
def test_golden(golden: dict[str, Tensor], bits: int) -> None:
    w, x, xt = golden["W"], golden["X"], golden["Xt"]
    step = C * alphabets.radius(w) / 2 ** (bits - 1)
    torch.testing.assert_close(step, golden[f"step_b{bits}"], rtol=1e-14, atol=0)
    for inputs, suffix in ((x, f"same_b{bits}"), (xt, f"b{bits}")):
        q = by_gram(w, x, inputs, alphabets.uniform(step, bits))
        torch.testing.assert_close(q, golden[f"Q_{suffix}"], rtol=0, atol=1e-10)
        error, energy = squared_error(
            w[None], q[None], (inputs.T @ inputs)[None], (inputs.T @ x)[None], (x.T @ x)[None]
        )
        norms = torch.stack([error.sqrt(), (error / energy).sqrt()]).flatten()
        torch.testing.assert_close(norms, golden[f"err_{suffix}"], rtol=1e-9, atol=0)


def test_golden_sparse_and_grouped(golden: dict[str, Tensor]) -> None:
    w, x, xt = golden["W"], golden["X"], golden["Xt"]
    largest = C * alphabets.radius(w)
    for key, alphabet in (
        ("Q_L1_b4_lam0.005", alphabets.uniform(largest / 8, 4, soft=0.005)),
        ("Q_L0_b4_lam0.005", alphabets.hard(largest, 4, 0.005)),
    ):
        torch.testing.assert_close(by_gram(w, x, xt, alphabet), golden[key], rtol=0, atol=1e-10)
    w = golden["Wg"]
    alphabet = alphabets.uniform(C * alphabets.radius(w) / 4, 3)
    q = by_gram(w, golden["Xg"], golden["Xtg"], alphabet, groups=3)
    torch.testing.assert_close(q, golden["Q_g3_b3"], rtol=0, atol=1e-10)
    xs, xts = (golden[key].reshape(40, 3, 8).movedim(1, 0) for key in ("Xg", "Xtg"))
    shaped = [value.reshape(3, 2, 8) for value in (w, q)]
    error, energy = squared_error(*shaped, xts.mT @ xts, xts.mT @ xs, xs.mT @ xs)
    # The reference reports the means over the groups.
    norms = torch.stack([error.sqrt().mean(), (error / energy).sqrt().mean()])
    torch.testing.assert_close(norms, golden["err_g3_b3"], rtol=1e-9, atol=0)


def test_golden_scalar_quantizers(golden: dict[str, Tensor]) -> None:
    """Ties, too. K = 3 is not a power of two, so that the alphabets are cut out of larger ones."""
    one = torch.ones((), dtype=torch.float64)
    x = golden["sq_x"]
    whole = alphabets.uniform(one, 3)
    for key, alphabet in (
        ("sq_msq_d1_K3", Alphabet(whole.levels[1:-1], whole.thresholds[1:-1])),
        ("sq_soft_d1_K3_l0.5", alphabets.uniform(one, 3, soft=0.5)),
        ("sq_hard_d1_K3_l0.5", alphabets.hard(4.5 * one, 3, 0.5)),
    ):
        got = level(alphabet, torch.searchsorted(alphabet.thresholds, x, right=True))
        assert torch.equal(got.clamp(golden[key].min(), golden[key].max()), golden[key] + 0), key


def case(seed: int, n: int, d: int, m: int, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(m, groups * d)
    xt = x + 0.3 * draw(m, groups * d)
    dead = torch.rand(groups * d, generator=generator) < 0.1
    xt[:, dead] = 0
    return draw(n * groups, d), x, xt


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 4),
    d=st.integers(1, 90),
    m=st.integers(1, 30),
    groups=st.integers(1, 3),
    bits=st.integers(1, 8),
    percentile=st.sampled_from([1.0, 0.9, 0.75]),
)
def test_equals_the_direct_recursion(
    seed: int, n: int, d: int, m: int, groups: int, bits: int, percentile: float
) -> None:
    w, x, xt = case(seed, n, d, m, groups)
    rows = np.quantile(w.abs().numpy(), percentile, axis=1)
    radius = alphabets.radius(w, percentile)
    torch.testing.assert_close(radius, torch.tensor(rows.mean()))
    step = float(C * radius / 2 ** (bits - 1))
    want, errors = direct(w, x, xt, msq(step, 2 ** (bits - 1)), groups)
    got = by_gram(w, x, xt, alphabets.uniform(torch.tensor(step, dtype=torch.float64), bits), groups)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    split = [value.reshape(m, groups, d).movedim(1, 0) for value in (xt, x)]
    shaped = [value.reshape(groups, n, d) for value in (w, got)]
    error, energy = squared_error(*shaped, split[0].mT @ split[0], split[0].mT @ split[1], split[1].mT @ split[1])
    torch.testing.assert_close(error.sum(), errors.square().sum(), rtol=1e-6, atol=1e-9 * float(energy.sum()))


@pytest.mark.parametrize("seed", range(5))
def test_other_alphabets_equal_the_direct_recursion(seed: int) -> None:
    w, x, xt = case(seed, 4, 70, 20, 2)
    radius, top = alphabets.radius(w), 4
    rows = alphabets.radius(w, per_channel=True)
    values = torch.cat([torch.linspace(-1, 1, 8, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]) * radius

    def hard(a: Tensor, _: int) -> Tensor:
        step = (radius - 0.1) / top
        steps = torch.floor(soft(a, 0.1) / step + 0.5).abs().clamp(max=top)
        return a.sign() * (0.1 + step * steps) * (a.abs() > 0.1)

    for alphabet, quantize in (
        (alphabets.uniform(radius / top, 3, soft=0.1), lambda a, _: msq(float(radius / top), top)(soft(a, 0.1), _)),
        (alphabets.hard(radius, 3, 0.1), hard),
        (alphabets.linspace(radius, 8, zero=True), lambda a, _: values[(values - a).abs().argmin()]),
        (alphabets.uniform(rows / top, 3), lambda a, neuron: msq(float(rows[neuron] / top), top)(a, neuron)),
        (
            alphabets.uniform(radius / top, 3, clipped=True),
            lambda a, _: torch.floor(a / radius * top + 0.5).clamp(-top, top - 1) * radius / top,
        ),
    ):
        want, _ = direct(w, x, xt, quantize, groups=2)
        torch.testing.assert_close(by_gram(w, x, xt, alphabet, groups=2), want, rtol=0, atol=1e-10)


def test_alphabets_have_the_levels_they_say() -> None:
    w = torch.randn(6, 50)
    radius = alphabets.radius(w)
    sizes = {
        "midtread": alphabets.uniform(radius / 8, 4),
        "clipped": alphabets.uniform(radius / 8, 4, clipped=True),
        "linspace and zero": alphabets.linspace(radius, 16, zero=True),
        "median": alphabets.linspace(alphabets.median_radius(w), 3, zero=False),
        "hard": alphabets.hard(radius, 4, 0.01),
    }
    assert {name: len(a.levels) for name, a in sizes.items()} == {
        "midtread": 17,
        "clipped": 16,
        "linspace and zero": 17,
        "median": 3,
        "hard": 19,
    }
    torch.testing.assert_close(alphabets.median_radius(w), torch.tensor(np.median(w.abs().numpy())))
    with pytest.raises(UserError, match="threshold=9"):
        alphabets.hard(radius, 4, 9.0)


def test_encodings_decode_to_the_levels() -> None:
    w, x, xt = (value.float() for value in case(3, 6, 30, 20))
    for alphabet in (
        alphabets.uniform(alphabets.radius(w) / 8, 4),
        alphabets.uniform(alphabets.radius(w, per_channel=True) / 8, 4),
        alphabets.hard(alphabets.radius(w, per_channel=True), 4, 0.01),
        alphabets.linspace(alphabets.radius(w), 8, zero=True),
    ):
        index = follow_path(w[None], (xt.T @ xt).double()[None], (xt.T @ x).double()[None], alphabet).indices[0]
        torch.testing.assert_close(alphabet.encoding(index).decode(), level(alphabet, index))


def test_the_least_squares_step_beats_the_range() -> None:
    w = torch.randn(5, 400)
    for per_channel in (False, True):
        step = alphabets.least_squares_step(w, 3, per_channel=per_channel)

        def error(delta: Tensor) -> Tensor:
            return (w - torch.floor(w / delta + 0.5).clamp(-4, 4) * delta).square().sum()

        assert error(step) < 0.7 * error(w.abs().max() / 4)
        assert step.shape == ((5, 1) if per_channel else ())


# What the theory guarantees.


@pytest.mark.parametrize(("bits", "d"), [(1, 8), (2, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_all_choices_is_a_bound_that_it_comes_near(seed: int, bits: int, d: int) -> None:
    w, x, xt = case(seed, 8, d, 40)
    mixing = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x, xt = x @ mixing, xt @ mixing
    alphabet = alphabets.uniform(C * alphabets.radius(w) / 2 ** (bits - 1), bits)
    every = torch.cartesian_prod(*[alphabet.levels] * d)
    wanted = w @ x.T

    def error(q: Tensor) -> Tensor:
        return (wanted - q @ xt.T).norm(dim=-1)

    best = torch.stack([(every @ xt.T - goal).norm(dim=1).min() for goal in wanted])
    nearest = error(alphabet.levels[torch.searchsorted(alphabet.thresholds, w, right=True)])
    found = error(by_gram(w, x, xt, alphabet))
    assert (best * (1 - 1e-9) <= found).all()
    assert best.sum() <= found.sum() < nearest.sum()


def unsaturated(seed: int, m: int = 20, d: int = 60) -> tuple[Tensor, Tensor, Alphabet, float]:
    w, x, _ = case(seed, 4, d, m)
    w, step = 0.1 * w, 0.05
    return w, x, alphabets.uniform(torch.tensor(step, dtype=torch.float64), 12), step


def test_each_error_is_orthogonal_up_to_half_a_step() -> None:
    w, x, alphabet, step = unsaturated(0)
    q = by_gram(w, x, x, alphabet)
    for t in range(1, w.shape[1] + 1):
        u = (w[:, :t] - q[:, :t]) @ x[:, :t].T
        assert ((u @ x[:, t - 1]).abs() <= step / 2 * x[:, t - 1].square().sum() * (1 + 1e-9)).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_error_is_bounded(seed: int) -> None:
    w, x, alphabet, step = unsaturated(seed)
    u = (w - by_gram(w, x, x, alphabet)) @ x.T
    assert (u.square().sum(1) <= step**2 / 4 * x.square().sum()).all()


def test_orthogonal_inputs_mean_rounding_to_nearest() -> None:
    w, _, alphabet, step = unsaturated(1, d=20)
    x = torch.linalg.qr(torch.randn(40, 20, dtype=torch.float64)).Q * torch.arange(1, 21)
    torch.testing.assert_close(by_gram(w, x, x, alphabet), torch.floor(w / step + 0.5) * step)


def test_one_constant_sample_is_sigma_delta() -> None:
    w, _, alphabet, step = unsaturated(2)
    ones = torch.ones(1, w.shape[1], dtype=torch.float64)
    u = (w - by_gram(w, ones, ones, alphabet)).cumsum(1)
    assert (u.abs() <= step / 2 + 1e-12).all()


def test_scaling_and_rotating_the_samples_changes_nothing() -> None:
    w, x, xt = case(4, 4, 60, 20)
    alphabet = alphabets.uniform(C * alphabets.radius(w) / 4, 3)
    rotation = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    q = by_gram(w, x, xt, alphabet)
    assert torch.equal(q, by_gram(w, 3 * x, 3 * xt, alphabet))
    assert torch.equal(q, by_gram(w, rotation @ x, rotation @ xt, alphabet))


def test_the_order_of_columns_matters_and_act_order_sorts_them() -> None:
    w, x, xt = case(5, 4, 60, 20)
    alphabet = alphabets.uniform(C * alphabets.radius(w) / 4, 3)
    order = xt.square().sum(0).argsort(descending=True, stable=True)
    sorted_by_hand = by_gram(w[:, order], x[:, order], xt[:, order], alphabet)[:, order.argsort()]
    assert torch.equal(by_gram(w, x, xt, alphabet, act_order=True), sorted_by_hand)
    assert not torch.equal(by_gram(w, x, xt, alphabet), sorted_by_hand)
    one = by_gram(w[:, :1], x[:, :1], xt[:, :1], alphabet)
    ratio = xt[:, 0] @ x[:, 0] / (xt[:, 0] @ xt[:, 0])
    step = float(alphabet.step)
    torch.testing.assert_close(one, torch.floor(w[:, :1] * ratio / step + 0.5).clamp(-4, 4) * step)


def test_dead_inputs_and_dead_neurons() -> None:
    w, x, xt = case(6, 3, 10, 8)
    x[:, 2], xt[:, 2], w[1] = 0, 0, 0
    q = by_gram(w, x, xt, alphabets.uniform(alphabets.radius(w, per_channel=True) / 4, 3))
    assert (q[:, 2] == 0).all()
    assert q.isfinite().all()
    assert (q[1] == 0).all()
