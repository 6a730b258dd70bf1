"""Weights moved to the bounds without changing what they answer: vertices of a polytope, all neurons at once."""

from __future__ import annotations

import torch
from torch import Tensor

_HELD = 1 << 23  # numbers in the inverses that are held at a time
_REFRESH = 64  # columns after which inverses are computed afresh
_FLAT = 1e-9  # a coordinate that moves by less, for one unit of another, does not stop it


def principal_rows(H: Tensor, most: int, tolerance: float = 1e-6) -> Tensor:
    """The directions that inputs mostly have: orthonormal, by decreasing energy.

    Args:
        H: X~'X~, (groups, d, d).
        most: take no more.
        tolerance: directions with less than this part of the greatest energy are none.

    Returns:
        (groups, k, d), where k is the rank of the group with the highest, or `most`.
    """
    energy, directions = torch.linalg.eigh(H)
    found = (energy > tolerance * energy[:, -1:]).sum(1)
    k = min(most, int(found.max()))
    return directions[:, :, directions.shape[2] - k :].flip(2).mT.contiguous()


def to_vertex(weight: Tensor, rows: Tensor, bound: Tensor) -> Tensor:
    """Move weights until all but at most k are exactly at plus or minus the bound, and `rows @ weight` is as before.

    k weights of linearly independent columns give way to one weight after the other as it moves in the direction that
    sooner brings one of them, or itself, to a bound; that one stays there. Source: arXiv:2209.03487.

    Args:
        weight: (groups, n, d), within the bound.
        rows: (groups, k, d), of rank k.
        bound: (groups, n, 1), above 0.

    Returns:
        (groups, n, d).
    """
    k, d = rows.shape[1:]
    if k >= d:
        return weight.clone()
    if k == 0:
        return torch.copysign(bound, weight)
    basis = _independent(rows)
    step = max(1, _HELD // (len(rows) * k * k))
    parts = [
        _Moves(part, rows, limit, basis).finish()
        for part, limit in zip(weight.split(step, 1), bound.split(step, 1), strict=True)
    ]
    return torch.cat(parts, 1)


def _independent(rows: Tensor) -> Tensor:
    """(groups, k): k columns, each the one that is furthest from the span of those before it."""
    left, chosen = rows.clone(), []
    for _ in range(rows.shape[1]):
        column = left.square().sum(1).argmax(1)
        chosen.append(column)
        direction = left.gather(2, column[:, None, None].expand(-1, left.shape[1], 1))
        direction = direction / direction.norm(dim=1, keepdim=True)
        left -= direction @ (direction.mT @ left)
        left.scatter_(2, column[:, None, None].expand(-1, left.shape[1], 1), 0.0)
    return torch.stack(chosen, 1)


class _Moves:
    """The moves of some neurons of every group; `basis` are the columns of each that give way."""

    def __init__(self, weight: Tensor, rows: Tensor, bound: Tensor, basis: Tensor) -> None:
        groups, n, d = weight.shape
        self.wanted, self.rows, self.bound = weight, rows, bound
        free = torch.ones(groups, d, dtype=torch.bool, device=weight.device).scatter_(1, basis, False)
        self.others = free.nonzero()[:, 1].reshape(groups, -1)
        self.basis = basis[:, None].expand(groups, n, -1).clone()
        self.z = weight.clone()
        self.own = weight.gather(2, self.basis)
        self._invert()

    def _invert(self) -> None:
        groups, n, k = self.basis.shape
        taken = self.rows.gather(2, self.basis.reshape(groups, 1, n * k).expand(groups, self.rows.shape[1], n * k))
        self.inverse = torch.linalg.inv(taken.unflatten(2, (n, k)).movedim(2, 1))

    def finish(self) -> Tensor:
        for t, column in enumerate(self.others.unbind(1), 1):
            self._move(column)
            if t % _REFRESH == 0:
                self._invert()
        self._invert()
        # What rounding has left of the change of the answers.
        z = self.z.scatter(2, self.basis, self.own)
        drift = (self.wanted - z) @ self.rows.mT
        self.own += (self.inverse @ drift[..., None])[..., 0]
        return self.z.scatter(2, self.basis, self.own.clamp(-self.bound, self.bound))

    def _move(self, column: Tensor) -> None:
        """Move the weights of one column in each group to a bound, or make room for them among those that give way."""
        groups, n, _ = self.own.shape
        place = column[:, None, None].expand(groups, n, 1)
        column_of_rows = self.rows.gather(2, column[:, None, None].expand(groups, self.rows.shape[1], 1))
        effect = (self.inverse @ column_of_rows[:, None])[..., 0]
        value = self.wanted.gather(2, place)
        stopper, stopped, move = self._farthest(effect, value)
        self.own.addcmul_(move, effect, value=-1)
        value = value + move
        # A weight that was stopped takes the place of the one that stopped it; else it is at the bound itself.
        leaving, stops = self.basis.gather(2, stopper), self.own.gather(2, stopper)
        settled = torch.copysign(self.bound, torch.where(stopped, stops, value))
        self.z.scatter_(2, torch.where(stopped, leaving, place), settled)
        self.basis.scatter_(2, stopper, torch.where(stopped, place, leaving))
        self.own.scatter_(2, stopper, torch.where(stopped, value, stops))
        # The inverse after that exchange.
        pivot = torch.where(stopped, effect.gather(2, stopper), torch.inf)
        change = effect.scatter_add(2, stopper, -torch.ones_like(pivot)) / pivot
        row = self.inverse.gather(2, stopper[..., None].expand(-1, -1, 1, self.inverse.shape[-1]))
        self.inverse.addcmul_(change[..., None], row, value=-1)

    def _farthest(self, effect: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which of `own` is in the way, whether the move ends there, and the move: (groups, n, 1) each."""
        moves = effect.abs() > _FLAT
        slowness = torch.where(moves, 1 / effect.abs(), torch.inf)
        # Upwards, a weight with a positive effect falls to -bound, one with a negative rises to +bound.
        towards = torch.where(moves, effect.sign() * self.own, 0.0).clamp(-self.bound, self.bound)
        room_up, stop_up = ((self.bound + towards) * slowness).min(-1, keepdim=True)
        room_down, stop_down = ((self.bound - towards) * slowness).min(-1, keepdim=True)
        own_up, own_down = self.bound - value, self.bound + value
        upwards = torch.minimum(room_up, own_up) <= torch.minimum(room_down, own_down)
        room, to_bound = torch.where(upwards, room_up, room_down), torch.where(upwards, own_up, own_down)
        move = torch.minimum(room, to_bound)
        return torch.where(upwards, stop_up, stop_down), room < to_bound, torch.where(upwards, move, -move)
