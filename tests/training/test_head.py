"""The convex head: at its optimum, the same one other solvers find, never leaking prompts."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from sarm.errors import InputError
from sarm.training import head as head_module
from sarm.training.head import (
    L2_GRID,
    SPARSE_POOL,
    assign_folds,
    fit_head,
    pair_accuracy,
)
from sarm.training.newton import minimise


def planted(rows=300, columns=40, density=0.3, seed=0, noise=1.0):
    """Differences whose sign of D @ truth decides each pair, up to noise; columns of all scales."""
    draw = np.random.default_rng(seed)
    d = draw.normal(size=(rows, columns)) * (draw.random((rows, columns)) < density)
    d *= np.logspace(-3, 3, columns)
    truth = draw.normal(size=columns) / np.logspace(-3, 3, columns)
    flip = (d @ truth + noise * draw.logistic(size=rows)) < 0
    d[flip] *= -1
    return d


def cross_validated(d, groups=None):
    return head_module.cross_validate(head_module.scaled_problem(d)[0], groups, 5)


def objective(d, weight, l2):
    """The formula of the module's docstring, written again."""
    margins = d @ weight
    scale = np.sqrt((d**2).mean(0))
    loss = np.mean(np.log1p(np.exp(-margins))) + l2 / 2 * np.sum((scale * weight) ** 2)
    gradient = -(d.T @ (1 / (1 + np.exp(margins)))) / len(d) + l2 * scale**2 * weight
    return loss, gradient / np.where(scale == 0, 1, scale)


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_the_gradient_vanishes_at_the_optimum(l2):
    d = planted()
    fit = fit_head(d, l2=l2)
    loss, gradient = objective(d, fit.weight, l2)
    assert np.abs(gradient).max() < 1e-6
    assert fit.gradient_norm < 1e-6
    assert fit.loss == pytest.approx(np.mean(np.log1p(np.exp(-(d @ fit.weight)))))
    assert fit.accuracy == np.mean(d @ fit.weight > 0)


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_agrees_with_scikit_learn(l2):
    """scikit-learn minimises w.w / 2 + C sum(log loss) over rows with labels 0 and 1.

    Every pair enters twice, as D with label 1 and as -D with label 0: the sum is 2 M times our
    mean, so with columns scaled to root mean square 1 both have one optimum when C = 1 / (2 M l2).
    """
    d = planted()
    scale = np.sqrt((d**2).mean(0))
    x = np.concatenate([d, -d]) / scale
    y = np.concatenate([np.ones(len(d)), np.zeros(len(d))])
    theirs = LogisticRegression(
        C=1 / (2 * len(d) * l2), fit_intercept=False, tol=1e-10, max_iter=10000, solver="newton-cg"
    )
    theirs.fit(x, y)
    ours = fit_head(d, l2=l2).weight * scale
    assert np.abs(ours - theirs.coef_[0]).max() < 1e-5 * np.abs(ours).max()


def test_two_starts_reach_one_optimum():
    scaled, _ = head_module.scaled_problem(planted())
    draw = np.random.default_rng(1)
    starts = draw.normal(size=(40, 2)) * [0, 5]
    found = minimise(scaled, 1e-3, starts)
    assert found.gradient_norm <= 1e-8
    assert np.abs(found.weight[:, 0] - found.weight[:, 1]).max() < 1e-5


def test_sparse_and_dense_agree():
    d = planted()
    dense, sparse = fit_head(d, l2=1e-2), fit_head(sp.csr_matrix(d), l2=1e-2)
    assert np.abs(dense.weight - sparse.weight).max() < 1e-6 * np.abs(dense.weight).max()
    single = fit_head(sp.csr_matrix(d, dtype=np.float32), l2=1e-2)
    assert np.abs(dense.weight - single.weight).max() < 1e-4 * np.abs(dense.weight).max()
    cv = cross_validated(sp.csr_matrix(d)), cross_validated(d)
    assert list(cv[0].values()) == pytest.approx(list(cv[1].values()), rel=1e-4)


def test_the_fit_does_not_depend_on_a_columns_scale():
    d = planted()
    factors = np.logspace(-2, 2, d.shape[1])
    a, b = fit_head(d, l2=1e-2).weight, fit_head(d * factors, l2=1e-2).weight
    assert np.abs(a - b * factors).max() < 1e-5 * np.abs(a).max()


@pytest.mark.parametrize("pool", [0.0, 1.0])
def test_the_fit_does_not_depend_on_the_unit_of_the_features(pool):
    d = planted()
    a, b = (fit_head(x, l2=1e-2, pool=pool).weight for x in (d, d * 1000))
    assert np.abs(a - b * 1000).max() < 1e-5 * np.abs(a).max()


def test_a_latent_hardly_seen_in_training_cannot_dominate_a_new_pair():
    d = planted() / np.logspace(-3, 3, 40)  # columns of one scale, as an SAE's latents are
    d[:, 3] = 0
    d[0, 3] = 1e-3
    for features in (d, sp.csr_matrix(d)):
        alone = np.abs(fit_head(features, l2=1e-2, pool=0).weight)
        pooled = np.abs(fit_head(features, l2=1e-2, pool=SPARSE_POOL).weight)
        assert alone[3] > 10 * np.delete(alone, 3).max()  # what pooling is for
        assert pooled[3] < np.delete(pooled, 3).max()


def test_columns_never_seen_get_no_weight():
    d = planted()
    d[:, [0, 7]] = 0
    weight = fit_head(d, l2=1e-2).weight
    assert weight[0] == 0
    assert weight[7] == 0


def test_separable_pairs_and_more_columns_than_rows_converge():
    d = np.abs(planted(rows=30, columns=200, density=1))
    fit = fit_head(d, l2=1e-4)
    assert fit.accuracy == 1
    assert fit.gradient_norm < 1e-6


# ---- cross-validation ----------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=2, max_size=60), st.integers(2, 7), st.integers(0, 3))
def test_folds_never_split_a_group(groups, folds, seed):
    fold_of = assign_folds(groups, folds, seed)
    homes = {g: {int(f) for f, h in zip(fold_of, groups, strict=True) if h == g} for g in groups}
    assert all(len(h) == 1 for h in homes.values())
    used = set(fold_of.tolist())
    assert used == set(range(min(folds, len(homes))))


def test_cross_validation_trains_on_other_groups_only(monkeypatch):
    """Copies of one pair share a prompt; split over folds they would leak and hide overfitting."""
    d = np.repeat(planted(rows=40, columns=200, density=1, noise=8), 5, axis=0)
    groups = [str(i // 5) for i in range(len(d))]
    together, split = cross_validated(d, groups), cross_validated(d)
    weak = min(together)
    assert split[weak] < 0.5 * together[weak]


@pytest.mark.parametrize(
    ("data", "low", "high"),
    [(planted(noise=60.0, density=1), 0.1, 1.0),
     (planted(rows=1000, columns=10, density=1, noise=0.3), 1e-4, 1e-2)],
    ids=["noise wants a strong penalty", "signal wants a weak one"],
)  # fmt: skip
def test_cross_validation_picks_the_right_order_of_magnitude(data, low, high):
    fit = fit_head(data)
    assert low <= fit.l2 <= high
    assert list(fit.cv) == list(L2_GRID[::-1][: len(fit.cv)])
    assert fit.cv[fit.l2] == min(fit.cv.values())
    assert len(fit.cv) == min(len(L2_GRID), list(fit.cv).index(fit.l2) + 3)  # two worse ones


def test_cross_validated_loss_is_that_of_heads_fitted_without_the_fold():
    d = planted(rows=60, columns=8)
    fold_of = assign_folds(range(60), 5)
    scaled, _ = head_module.scaled_problem(d)
    total = 0.0
    for fold in range(5):
        part = scaled.rows(fold_of != fold)
        (weight,) = minimise(part, L2_GRID[7], np.zeros((8, 1))).weight.T
        total += np.log1p(np.exp(-(scaled.differences[fold_of == fold] @ weight))).sum()
    assert cross_validated(d)[L2_GRID[7]] == pytest.approx(total / 60, rel=1e-3)


def test_a_given_l2_is_not_cross_validated():
    fit = fit_head(planted(), l2=0.5)
    assert fit.l2 == 0.5
    assert fit.cv == {}


def test_equal_pairs_pull_neither_way():
    d = planted()
    with_equal = np.concatenate([d, np.zeros((len(d), d.shape[1]))])
    fit = fit_head(with_equal, l2=1e-2)
    assert fit.accuracy == pytest.approx(0.5 * np.mean(d @ fit.weight > 0) + 0.25)
    assert np.all(np.isfinite(fit.weight))


def test_ties_count_a_half():
    assert pair_accuracy(np.array([1.0, -1.0, 0.0, 2.0])) == 0.625


# ---- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        (np.ones((1, 3)), {}, "at least 2 pairs, got 1"),
        (np.full((3, 3), np.nan), {}, "NaN or infinite"),
        (sp.csr_matrix(np.full((3, 3), np.inf)), {}, "NaN or infinite"),
        (np.zeros((3, 3)), {}, "equal features in every pair"),
        (sp.csr_matrix((3, 3)), {}, "equal features in every pair"),
        (np.ones((3, 3)), {"l2": 0}, "l2 must be positive, got 0"),
        (np.ones((3, 3)), {"l2": float("nan")}, "l2 must be positive, got nan"),
        (np.ones((3, 3)), {"l2": float("inf")}, "l2 must be positive, got inf"),
        (np.ones((3, 3)), {"centre": -1.0, "sums": np.ones((3, 3))}, "centre must be >= 0, got -1"),
        (np.ones((3, 3)), {"centre": float("nan"), "sums": np.ones((3, 3))}, "centre must be >= 0"),
        (np.ones((3, 3)), {"groups": ["a"] * 3}, "pairs of 2 prompts or more"),
    ],
)
def test_refusals(data, options, says):
    with pytest.raises(InputError, match=says):
        fit_head(data, **options)
