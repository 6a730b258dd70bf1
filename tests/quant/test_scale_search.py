"""The search finds the best candidate, and takes the factors in turn."""

import torch

from qbench.quant.scale_search import Factor, search


def generator():
    return torch.Generator().manual_seed(0)


def rounded(x, step):
    return (x / step).round().clamp(-4, 3) * step


GRID = torch.linspace(0.05, 1, 12)


def setting(channels):
    w, x = torch.randn(5, 6, generator=generator()), torch.randn(40, 6, generator=generator())
    w *= torch.logspace(-1, 1, 5)[:, None]
    start = torch.ones(5) if channels else torch.ones(())
    left = Factor(lambda point: rounded(w, point[:, None] if channels else point), GRID, start)
    right = Factor(lambda point: rounded(x, point), GRID, torch.ones(()))
    importance = torch.rand(40, 5, generator=generator()) ** 4
    return left, right, lambda a, b: b @ a.T, x @ w.T, importance


def brute(left, right, product, target, importance):
    """Both factors in turn, every candidate of each looked at."""
    a, b = torch.ones(()), torch.ones(())

    def error(u, v):
        return float(((product(left.quantized(u), right.quantized(v)) - target).square() * importance).sum())

    for _ in range(3):
        a = min(GRID, key=lambda u: error(u, b))
        b = min(GRID, key=lambda v: error(a, v))
    return a, b, error(a, b)


def test_tensor_against_brute_force():
    left, right, product, target, importance = setting(channels=False)
    a, b, least = brute(left, right, product, target, importance)
    found = search((left, right), product, target, importance, rounds=3, channels=-1)
    assert (left.point, right.point) == (a, b)
    assert abs(found - least) <= 1e-4 * least


def test_each_channel_has_its_own_point():
    left, right, product, target, importance = setting(channels=True)
    search((left, right), product, target, importance, rounds=1, channels=-1)
    x = right.quantized(torch.ones(()))
    for channel in range(5):
        answers = [x @ left.quantized(u.expand(5))[channel] for u in GRID]
        errors = [((y - target[:, channel]).square() * importance[:, channel]).sum() for y in answers]
        assert left.point[channel] == GRID[errors.index(min(errors))]
    assert left.point.unique().numel() > 1


def test_more_rounds_are_never_worse():
    errors = []
    for rounds in (1, 2, 4):
        left, right, *rest = setting(channels=False)
        errors.append(search((left, right), *rest, rounds=rounds, channels=-1))
    assert errors == sorted(errors, reverse=True)
