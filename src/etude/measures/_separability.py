"""How well classes can be told apart by vectors that nobody trained for them: LogME, H-score, nearest neighbours, one item a text."""

from __future__ import annotations

import numpy as np

ROUNDS, TOLERANCE, TINY = 500, 1e-6, 1e-12
"""Of LogME's fixed point: most rounds, the relative change at which it ends, and what no divisor falls below."""


def logme_items(states: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """LogME: the largest log-evidence of Bayesian linear regression of each class's indicator on the vectors, a text and class, in nats (You et al., 2021, section 4).

    states (texts, width); labels (texts,), numbers of classes.  Of an indicator y, with weights w ~ N(0, 1/α) and noise of precision β, the evidence is that of
    y ~ N(0, I/β + states·statesᵀ/α); α and β are those that make it largest.  Returns (texts,), whose mean is LogME and whose spread is its uncertainty to first
    order: the evidence's derivative by the weight of each text, α, β and w staying as they are, since they are stationary.
    Cost: a singular value decomposition.
    """
    states = states.astype(np.float64)
    left, singular, _ = np.linalg.svd(states, full_matrices=False)
    kept = singular > 1e-10 * max(singular.max(), TINY)
    left, singular = left[:, kept], singular[kept]
    items = np.zeros(len(states))
    classes = np.unique(labels)
    for one in classes:
        items += _evidence_items(left, singular**2, states.shape[1], (labels == one).astype(np.float64))
    return items / len(classes)


def _evidence_items(left: np.ndarray, squares: np.ndarray, width: int, y: np.ndarray) -> np.ndarray:
    """The largest log-evidence of y a text, as influences; left (texts, rank) and squares (rank,) of the singular value decomposition."""
    count, along = len(y), left.T @ y
    alpha, beta = precisions(squares, along**2, float(y @ y - along @ along), count)
    shrunk = beta * squares / (alpha + beta * squares)  # of each direction, how much is fitted
    residuals = y - left @ (shrunk * along)
    weights = float((along**2 * shrunk**2 / squares).sum())  # |w|²
    determinant = np.log(alpha + beta * squares).sum() + (width - len(squares)) * np.log(alpha)
    total = (width * np.log(alpha) + count * np.log(beta / (2 * np.pi)) - beta * (residuals @ residuals) - alpha * weights - determinant) / 2
    influence = -0.5 * beta * residuals**2 - 0.5 * (left**2 @ shrunk)  # what does not depend on the text falls out
    found: np.ndarray = total / count + influence - influence.mean()
    return found


def precisions(squares: np.ndarray, along: np.ndarray, outside: float, count: int) -> tuple[float, float]:
    """The precisions α of the weights and β of the noise that make the evidence largest, by MacKay's fixed point.

    squares and along (rank,): squared singular values, and squared projections of y on their left vectors; outside: what of |y|² lies in none of them.
    """
    alpha = beta = 1.0
    for _ in range(ROUNDS):
        before = alpha / beta
        fitted = squares / (squares + before)
        effective = fitted.sum()
        weights = (along * fitted**2 / squares).sum()
        residual = (along * (1 - fitted) ** 2).sum() + max(outside, 0.0)
        alpha, beta = effective / max(weights, TINY) if effective > TINY else 1.0, (count - effective) / max(residual, TINY)
        if abs(alpha / beta - before) <= TOLERANCE * before:
            break
    return float(alpha), float(beta)


def h_score_items(states: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """H-score: the trace of the classes' covariance in the metric of the whole, with the covariance shrunk (Ibrahim et al., 2022, equation 5).

    states (texts, width); labels (texts,).  The covariance is shrunk towards a multiple of the identity as Ledoit and Wolf (2004) have it, and the classes'
    by the same share.  Returns (texts,): each text's share of the trace, whose mean is the score; the covariance counts as known.  Cost: width³.
    """
    centred = states.astype(np.float64) - states.mean(0, dtype=np.float64)
    count, width = centred.shape
    covariance = centred.T @ centred / count
    share, scale = shrinkage(centred, covariance), np.trace(covariance) / width
    shrunk = (1 - share) * covariance + share * scale * np.eye(width)
    means = np.zeros_like(centred)
    for one in np.unique(labels):
        means[labels == one] = centred[labels == one].mean(0)
    metric = np.linalg.pinv(shrunk, hermitian=True)
    found: np.ndarray = count / (count - 1) * (1 - share) * np.einsum("ij,jk,ik->i", centred, metric, means, optimize=True)
    return found


def shrinkage(centred: np.ndarray, covariance: np.ndarray) -> float:
    """Ledoit and Wolf's share of the identity, in [0, 1]; centred (texts, width) and its covariance, divided by the texts."""
    count, width = centred.shape
    spread = ((centred**2).sum(1) ** 2).sum() / count - (covariance**2).sum()
    distance = (covariance**2).sum() - np.trace(covariance) ** 2 / width
    return float(np.clip(spread / count / distance, 0, 1)) if distance > TINY * (covariance**2).sum() else 1.0


def neighbour_items(states: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether most of the k nearest other texts have the text's class, (texts,) of 0 and 1; of classes as frequent among them that of the nearer one.

    Distances are Euclidean; of texts as near the first counts.  Cost: texts² · width.
    """
    states = states.astype(np.float64)
    norms = (states**2).sum(1)
    distances = norms[:, None] + norms - 2 * states @ states.T
    np.fill_diagonal(distances, np.inf)
    near = labels[np.argsort(distances, axis=1, kind="stable")[:, : min(k, len(labels) - 1)]]
    return np.array([row[np.argmax([(row == one).sum() for one in row])] == label for row, label in zip(near, labels, strict=True)], float)


def kendall_items(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Kendall's τ-b as influences, one a thing that is ranked: their mean is τ-b, their spread its uncertainty to first order, the ties taken as they are.

    one, other (things,).  With c(i) the mean agreement of thing i with the others, an item is 2 c(i) - τ.  Zero everywhere if one side says nothing.
    """
    signs = [np.sign(values[:, None] - values) for values in (one, other)]
    untied = float(np.prod([(sign != 0).sum() for sign in signs])) ** 0.5
    if not untied:
        return np.zeros(len(one))
    agreement = (signs[0] * signs[1]).sum(1) * len(one) / untied
    found: np.ndarray = 2 * agreement - agreement.mean()
    return found
