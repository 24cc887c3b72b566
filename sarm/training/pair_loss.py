"""The smooth part of the head's problem, as a function of its weights.

f(w) = mean_i log(1 + exp(m_i - D_i w))  +  centre * mean_i (S_i w)^2

D (M, F) features of chosen minus rejected    S (M, F) of chosen plus rejected    m (M,) margins
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.special import expit, xlogy


@dataclass(frozen=True)
class PairLoss:
    """f, its gradient, Hessian and dual; matrices are numpy or scipy CSR, fp64.

    sums may be None where centre is 0.
    """

    differences: Any
    margins: np.ndarray
    sums: Any = None
    centre: float = 0.0
    _transposed: tuple = field(default=(), repr=False)

    def __post_init__(self) -> None:
        parts = [self.differences, *([self.sums] if self.centre else [])]
        # a product with a CSR transpose scatters; one with its own CSR copy does not
        object.__setattr__(
            self, "_transposed", tuple(p.T.tocsr() if sp.issparse(p) else p.T for p in parts)
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(M pairs, F features)."""
        return self.differences.shape

    def rows(self, chosen: np.ndarray) -> PairLoss:
        """Of some pairs."""
        sums = self.sums[chosen] if self.centre else None
        return replace(
            self, differences=self.differences[chosen], margins=self.margins[chosen], sums=sums
        )

    def columns(self, chosen: np.ndarray) -> PairLoss:
        """Of some features, the others' weights being zero."""
        d, *s = (t[chosen].T for t in self._transposed)
        d, *s = (t.tocsr() if sp.issparse(t) else t for t in (d, *s))
        return replace(self, differences=d, sums=s[0] if s else None)

    def __call__(self, weight: np.ndarray) -> tuple[float, np.ndarray]:
        """(f, gradient (F,)) at weight (F,)."""
        lacking = self.margins - self.differences @ weight
        loss = np.logaddexp(0, lacking).mean()
        gradient = -(self._transposed[0] @ expit(lacking))
        if self.centre:
            totals = self.sums @ weight
            loss += self.centre * np.square(totals).mean()
            gradient += 2 * self.centre * (self._transposed[1] @ totals)
        return float(loss), gradient / len(self.margins)

    # ---- the same for columns of weights, and with other weights of the pairs -------------------

    def products(self, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """D W and S W, both (M, C), of weights (F, C); the latter is 0 without centring."""
        rewards = self.differences @ weight
        return rewards, self.sums @ weight if self.centre else np.zeros((1, weight.shape[1]))

    def pulled(self, of_differences: np.ndarray, of_sums: np.ndarray) -> np.ndarray:
        """(F, C): D^T u + S^T v, the transpose of `products`."""
        found = self._transposed[0] @ of_differences
        return found + self._transposed[1] @ of_sums if self.centre else found

    def values(self, rewards: np.ndarray, totals: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """(C,) f, where D W = rewards and S W = totals; shares (M, C) in the place of 1 / M."""
        loss = (shares * np.logaddexp(0, self.margins[:, None] - rewards)).sum(0)
        return loss + self.centre * (shares * np.square(totals)).sum(0) if self.centre else loss

    def slopes(self, rewards: np.ndarray, totals: np.ndarray, shares: np.ndarray) -> tuple:
        """f's first and second derivatives by rewards and by totals, each a pair of (M, C)."""
        lacking = expit(self.margins[:, None] - rewards)
        centring = 2 * self.centre * shares if self.centre else np.zeros_like(totals)
        first = -shares * lacking, centring * totals
        return first, (shares * lacking * (1 - lacking), centring)

    def mean_squares(self) -> np.ndarray:
        """(F,) of the columns of D."""
        return mean_squares(self.differences)

    def pair_gradients(self, weight: np.ndarray):
        """(M, F): the gradient of every pair's own loss; f's is their mean."""
        slope = -expit(self.margins - self.differences @ weight)
        found = scaled_rows(self.differences, slope)
        if self.centre:
            found = found + scaled_rows(self.sums, 2 * self.centre * (self.sums @ weight))
        return found

    def hessian(self, weight: np.ndarray) -> np.ndarray:
        """(F, F), dense."""
        sure = expit(self.margins - self.differences @ weight)
        terms = [(self.differences, np.sqrt(sure * (1 - sure)))]
        if self.centre:
            terms.append((self.sums, np.full(self.shape[0], np.sqrt(2 * self.centre))))
        total = np.zeros((self.shape[1], self.shape[1]))
        for matrix, factor in terms:
            rows = scaled_rows(matrix, factor)
            product = rows.T @ rows
            total += product.toarray() if sp.issparse(product) else product
        return total / self.shape[0]

    def dual(self, weight: np.ndarray, l1: float, l2: float) -> float:
        """A lower bound of min_w f(w) + l1 |w|_1 + l2/2 |w|^2, tight at the optimum.

        From log(1 + e^t) = max_u u t - u log u - (1 - u) log(1 - u) and c y^2 = max_v v y - v^2/4c,
        at the u and v that belong to `weight`. With l2 = 0 they are shrunk until feasible.
        """
        u = expit(self.margins - self.differences @ weight)
        v = 2 * self.centre * (self.sums @ weight) if self.centre else np.zeros(1)
        pull = self._transposed[0] @ u
        if self.centre:
            pull = pull - self._transposed[1] @ v
        pull = np.abs(pull) / len(u)
        beyond = 0.0
        if l2 > 0:
            beyond = np.square(np.maximum(pull - l1, 0)).sum() / (2 * l2)
        elif pull.max() > l1:
            u, v = u * (l1 / pull.max()), v * (l1 / pull.max())
        entropy = -(xlogy(u, u) + xlogy(1 - u, 1 - u)).mean()
        spread = np.square(v).mean() / (4 * self.centre) if self.centre else 0.0
        return float(entropy + (u * self.margins).mean() - spread - beyond)


def scaled_rows(matrix, factor: np.ndarray):
    """Every row times its factor."""
    return sp.diags(factor) @ matrix if sp.issparse(matrix) else matrix * factor[:, None]


def mean_squares(matrix) -> np.ndarray:
    """(F,) of the columns of a matrix (M, F), fp64."""
    if sp.issparse(matrix):
        wide = matrix.astype(np.float64)
        return np.asarray(wide.multiply(wide).sum(axis=0)).ravel() / matrix.shape[0]
    return np.square(matrix, dtype=np.float64).mean(axis=0)
