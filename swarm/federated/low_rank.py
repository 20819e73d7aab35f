"""The best low-rank approximation of a product of tall factors, with the same bits on every machine. Pure.

    B [O, r], A [r, I] ─► thin QR of B and of A^T ─► SVD of the small core R_B R_A^T [r, r] ─► B' [O, k], A' [k, I]

The product B A, which is as large as a weight, is never formed: O((O + I) r^2) for each linear. LAPACK would do this in
a line, but rounds differently from one CPU, thread count or version to the next, and clients that have aggregated the
same updates must hold the same adapter. So nothing is used here but element-by-element sums, products, quotients and
roots of float64, whose results IEEE 754 fixes, in an order that this module fixes: QR by Gram-Schmidt, done twice
(Giraud et al., 2005: twice is enough), and the SVD by one-sided Jacobi rotations (Hestenes, 1958), of disjoint pairs
at once. All linears of one shape are done together.

Legend: L linears, N rows of a tall factor, R and C columns. Columns come first, so that they are contiguous: x_RNL.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_SAME = 1e-14
"""Columns whose cosine is below count as orthogonal."""
_NOTHING = 1e-12
"""A column of which less than this is left belongs to those before it."""
_MAX_SWEEPS = 40
"""Jacobi converges quadratically; ten are usual."""


class LowRank(NamedTuple):
    """Factors of the best approximation."""

    b_KOL: Floats
    """Left singular vectors times singular values."""
    a_KIL: Floats
    """Right singular vectors."""
    sigma_RL: Floats
    """All singular values, largest first, those that were left out included."""


def truncate(b_ROL: Floats, a_RIL: Floats, rank: int) -> LowRank:
    """The product of two tall factors in fewer columns, as near as that can be (Eckart and Young, 1936).

    Args:
        b_ROL: columns of B.
        a_RIL: rows of A.
        rank: columns that remain; where there are fewer, the rest is zero.
    """
    q_b, r_b = _qr(b_ROL)
    q_a, r_a = _qr(a_RIL)
    core_CRL = _inner(r_b, r_a).transpose(1, 0, 2)  # column c, row r: sum of R_B R_A^T
    u_CRL, v_CRL = _jacobi(core_CRL)
    sigma_CL = np.sqrt(_sum(u_CRL * u_CRL, 1))
    order = np.argsort(-sigma_CL, axis=0, kind="stable")
    sigma_CL = np.take_along_axis(sigma_CL, order, 0)
    kept = order[:rank, None, :]
    left_KRL, right_KRL = (np.take_along_axis(x, kept, 0) for x in (u_CRL, v_CRL))
    return LowRank(_product(q_b, left_KRL, rank), _product(q_a, right_KRL, rank), sigma_CL)


def squared_norm(b_ROL: Floats, a_RIL: Floats) -> Floats:
    """[L]: the sum of squares of B A, which is never formed."""
    gram_b, gram_a = _inner(b_ROL, b_ROL), _inner(a_RIL, a_RIL)
    found: Floats = np.maximum(_sum(_sum(gram_b * gram_a, 0), 0), 0.0)
    return found


def _inner(x_RNL: Floats, y_CNL: Floats) -> Floats:
    """[R, C, L]: products of all columns with all, one of x after the other, so that C N L numbers are in work."""
    return np.stack([_sum(x_NL[None] * y_CNL, 1) for x_NL in x_RNL])


def _sum(x: Floats, axis: int) -> Floats:
    """A sum in an order of its own: by halves, the odd one out to the first."""
    x = np.moveaxis(x, axis, 0)
    if not len(x):
        return np.zeros(x.shape[1:])
    while len(x) > 1:
        half = len(x) // 2
        folded = x[:half] + x[half : 2 * half]
        if len(x) % 2:
            folded[0] = folded[0] + x[-1]
        x = folded
    total: Floats = x[0]
    return total


def _qr(x_RNL: Floats) -> tuple[Floats, Floats]:
    """Orthonormal columns q_RNL and the triangle r_RCL with x_c = sum over r of r[r, c] q_r; columns that depend on
    those before them get q = 0."""
    num_columns, _, num_linears = x_RNL.shape
    q_RNL = np.zeros_like(x_RNL)
    r_RCL = np.zeros((num_columns, num_columns, num_linears))
    for column in range(num_columns):
        v_NL = x_RNL[column].copy()
        before_L = np.sqrt(_sum(v_NL * v_NL, 0))
        done = q_RNL[:column]
        for _ in range(2 if column else 0):
            parts_RL = _sum(done * v_NL, 1)
            v_NL = v_NL - _sum(done * parts_RL[:, None, :], 0)
            r_RCL[:column, column] += parts_RL
        norm_L = np.sqrt(_sum(v_NL * v_NL, 0))
        is_new = norm_L > before_L * _NOTHING
        q_RNL[column] = np.where(is_new, v_NL / np.where(is_new, norm_L, 1.0), 0.0)
        r_RCL[column, column] = np.where(is_new, norm_L, 0.0)
    return q_RNL, r_RCL


def _jacobi(core_CRL: Floats) -> tuple[Floats, Floats]:
    """Rotate columns until they are orthogonal: core = u v^T with orthogonal columns of u and orthonormal v."""
    num_columns = core_CRL.shape[0]
    u, v = core_CRL.copy(), np.zeros_like(core_CRL)
    v[np.arange(num_columns), np.arange(num_columns)] = 1.0
    rounds = _rounds(num_columns)
    for _ in range(_MAX_SWEEPS):
        num_rotated = sum(_rotate(u, v, left, right) for left, right in rounds)
        if not num_rotated:
            break
    return u, v


def _rotate(u: Floats, v: Floats, left: NDArray[np.int64], right: NDArray[np.int64]) -> bool:
    """Make disjoint pairs of columns orthogonal; False where they all were."""
    one, other = u[left], u[right]
    alpha, beta, gamma = _sum(one * one, 1), _sum(other * other, 1), _sum(one * other, 1)
    wants = np.abs(gamma) > _SAME * np.sqrt(alpha) * np.sqrt(beta)
    if not wants.any():
        return False
    zeta = (beta - alpha) / (2.0 * np.where(wants, gamma, 1.0))
    with np.errstate(over="ignore"):  # a root of infinity gives an angle of 0
        tangent = np.where(zeta < 0, -1.0, 1.0) / (np.abs(zeta) + np.sqrt(1.0 + zeta * zeta))
    cosine = np.where(wants, 1.0 / np.sqrt(1.0 + tangent * tangent), 1.0)[:, None, :]
    sine = np.where(wants, tangent, 0.0)[:, None, :] * cosine
    for x in (u, v):
        first, second = x[left], x[right]
        x[left], x[right] = cosine * first - sine * second, sine * first + cosine * second
    return True


def _rounds(num_columns: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs of columns, in rounds of disjoint ones, as at a tournament."""
    players = list(range(num_columns + num_columns % 2))
    rounds = []
    for _ in range(len(players) - 1):
        half = len(players) // 2
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        real = [(min(pair), max(pair)) for pair in pairs if max(pair) < num_columns]
        if real:
            rounds.append((np.array([a for a, _ in real]), np.array([b for _, b in real])))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def _product(q_RNL: Floats, w_KRL: Floats, rank: int) -> Floats:
    """Columns k: the sum over r of w[k, r] q_r, in the order of r; zero where there is no column k."""
    out_KNL = np.zeros((rank, *q_RNL.shape[1:]))
    for row, q_NL in enumerate(q_RNL):
        out_KNL[: len(w_KRL)] += w_KRL[:, row, None, :] * q_NL
    return out_KNL
