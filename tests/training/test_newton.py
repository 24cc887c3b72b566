"""The Newton solver finds the minimum that a general solver finds, for every column by itself."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import minimize

from sarm.errors import InputError
from sarm.training import head, newton
from sarm.training.head import fit_head, held_out
from sarm.training.newton import conjugate_gradients, minimise
from sarm.training.pair_loss import PairLoss

L2 = 1e-2


def problem(rows=120, columns=12, centre=0.0, sparse=False, seed=0):
    draw = np.random.default_rng(seed)
    d, s = (draw.normal(size=(rows, columns)) * (draw.random((rows, columns)) < 0.5) for _ in "ds")
    wrap = sp.csr_matrix if sparse else np.asarray
    return PairLoss(wrap(d), draw.random(rows), wrap(s) if centre else None, centre)


def expected(part, l2=L2):
    def objective(weight):
        loss, gradient = part(weight)
        return loss + 0.5 * l2 * weight @ weight, gradient + l2 * weight

    options = {"maxiter": 5000, "gtol": 1e-10, "ftol": 0}
    start = np.zeros(part.shape[1])
    return minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("centre", [0.0, 0.7])
def test_each_column_is_the_minimum_over_its_own_pairs(centre, sparse):
    """Margins, centring and the folds' shares; every fold's problem is also solved on its own."""
    whole = problem(centre=centre, sparse=sparse)
    held = held_out(120, None, 4)
    found = minimise(whole, L2, np.zeros((12, 4)), ~held / (~held).sum(0))
    assert found.gradient_norm <= 1e-8
    for column, out in zip(found.weight.T, held.T, strict=True):
        assert column == pytest.approx(expected(whole.rows(~out)), abs=1e-6)


@pytest.mark.parametrize("far", [1e1, 1e3, 1e5])
def test_a_start_far_away_ends_at_the_same_minimum(far):
    """There every pair's curvature is zero, and a whole Newton step overshoots."""
    part = problem()
    start = far * np.random.default_rng(1).normal(size=(12, 3))
    ends = minimise(part, L2, start).weight
    assert ends == pytest.approx(np.tile(expected(part)[:, None], 3), abs=1e-6)


def test_the_objective_never_grows(monkeypatch):
    part, search = problem(seed=3), newton._line_search

    def checked(problem, l2, at, along, shares):
        taken = search(problem, l2, at, along, shares)
        before, after = at[0][:, 0], (at[0] + taken * along[0])[:, 0]
        values = [part(w)[0] + 0.5 * l2 * w @ w for w in (before, after)]
        assert values[1] <= values[0] * (1 + 1e-11)
        steps.append(taken.item())
        return taken

    steps: list[float] = []
    monkeypatch.setattr(newton, "_line_search", checked)
    minimise(part, 1e-4, 50 * np.ones((12, 1)))
    assert min(steps) < 1  # a whole step was too far somewhere


def test_conjugate_gradients_solve_every_column():
    draw = np.random.default_rng(0)
    root = draw.normal(size=(30, 20))
    matrix = root.T @ root + 0.1 * np.eye(20)
    right = draw.normal(size=(20, 3))
    right[:, 1] = 0  # solved before it began
    scale = np.tile(np.diag(matrix)[:, None], 3)
    found = conjugate_gradients(lambda x: matrix @ x, right, scale, 1e-10)
    assert found == pytest.approx(np.linalg.solve(matrix, right), abs=1e-8)
    assert not found[:, 1].any()


@pytest.mark.parametrize("pool", [0.0, 1.0])
def test_turning_to_the_principal_axes_changes_nothing_but_the_way(pool, monkeypatch):
    draw = np.random.default_rng(0)
    d = draw.normal(size=(200, 6)) @ draw.normal(size=(6, 20)) + 0.1 * draw.normal(size=(200, 20))
    d[:, 4] = 0
    turned = fit_head(d, pool=pool)
    monkeypatch.setattr(head, "WIDEST_ROTATED", 0)
    straight = fit_head(d, pool=pool)
    assert turned.l2 == straight.l2
    assert turned.weight == pytest.approx(straight.weight, abs=1e-6 * np.abs(turned.weight).max())
    assert turned.weight[4] == 0
    assert turned.cv == pytest.approx(straight.cv, rel=1e-4)


def test_the_same_bits_twice():
    whole = problem(sparse=True)
    first, second = (minimise(whole, L2, np.zeros((12, 1))).weight for _ in range(2))
    assert (first == second).all()


def test_no_optimum_is_said(monkeypatch):
    monkeypatch.setattr(newton, "MOST_STEPS", 1)
    with pytest.raises(InputError, match="no optimum after 1 steps, gradient"):
        minimise(problem(), L2, np.ones((12, 1)))
