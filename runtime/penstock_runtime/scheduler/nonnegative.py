"""Least squares over coefficients that are not negative, for a handful of unknowns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def solve_nonnegative(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    """Return the u ≥ 0 that minimises uᵀ·matrix·u - 2·vectorᵀ·u.

    Args:
        matrix: symmetric and positive definite, (n, n).
        vector: (n,).

    The active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23),
    on the normal equations. Finite; at most a few 4 by 4 systems for the cost model.
    """
    n = len(vector)
    scale = [1 / math.sqrt(matrix[i][i]) for i in range(n)]
    # Scaled to a unit diagonal: the units of the unknowns differ by many orders of magnitude.
    scaled = [[matrix[i][j] * scale[i] * scale[j] for j in range(n)] for i in range(n)]
    wanted = [vector[i] * scale[i] for i in range(n)]
    solution = [0.0] * n
    free: list[int] = []
    tolerance = 1e-12 * max(1e-300, *(abs(w) for w in wanted))
    for _ in range(3 * n):
        gradient = [wanted[i] - sum(scaled[i][j] * solution[j] for j in range(n)) for i in range(n)]
        candidates = [i for i in range(n) if i not in free and gradient[i] > tolerance]
        if not candidates:
            break
        free.append(max(candidates, key=gradient.__getitem__))
        solution = _descend(scaled, wanted, solution, free)
    return [max(0.0, s * u) for s, u in zip(scale, solution, strict=True)]


def _descend(
    matrix: Sequence[Sequence[float]],
    vector: Sequence[float],
    solution: list[float],
    free: list[int],
) -> list[float]:
    """Go to the least point over the free unknowns, fixing at 0 those met on the way."""
    while free:
        target = [0.0] * len(solution)
        for i, value in zip(free, _solve(matrix, vector, free), strict=True):
            target[i] = value
        blocked = [i for i in free if target[i] <= 0]
        if not blocked:
            return target
        share = min(
            solution[i] / (solution[i] - target[i]) if solution[i] > 0 else 0.0 for i in blocked
        )
        solution = [u + share * (t - u) for u, t in zip(solution, target, strict=True)]
        stuck = min(blocked, key=lambda i: solution[i])
        for i in [i for i in blocked if solution[i] <= 1e-15 or i == stuck]:
            solution[i] = 0.0
            free.remove(i)
    return solution


def _solve(
    matrix: Sequence[Sequence[float]], vector: Sequence[float], free: Sequence[int]
) -> list[float]:
    """Solve the sub-system of the free unknowns by Cholesky, pivots bounded away from 0."""
    size = len(free)
    lower = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[free[i]][free[j]] - sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i][j] = math.sqrt(max(rest, 1e-14)) if i == j else rest / lower[j][j]
    forward: list[float] = []
    for i in range(size):
        forward.append(
            (vector[free[i]] - sum(lower[i][k] * forward[k] for k in range(i))) / lower[i][i]
        )
    backward = [0.0] * size
    for i in reversed(range(size)):
        above = sum(lower[k][i] * backward[k] for k in range(i + 1, size))
        backward[i] = (forward[i] - above) / lower[i][i]
    return backward
