"""Distances between sets of samples, in the feature space of a network the caller chose."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lehr.runtime.errors import InvalidInput

Array = npt.NDArray[Any]


def frechet_distance(features: Array, reference: Array) -> float:
    """Fréchet distance of two Gaussians fitted to (N, D) and (M, D) features (Heusel et al. 2017, arXiv:1706.08500).

    |m_1 - m_2|² + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)); the root's trace is the sum of the square roots of the
    eigenvalues of C_1^(1/2) C_2 C_1^(1/2), which is symmetric.

    Raises:
        InvalidInput: fewer than two samples on a side, or features of different width.
    """
    if min(len(features), len(reference)) < 2 or features.shape[1:] != reference.shape[1:]:
        raise InvalidInput(
            f"a Fréchet distance needs two samples a side and equal features, got {features.shape}, {reference.shape}."
        )
    means = [np.mean(x, axis=0, dtype=np.float64) for x in (features, reference)]
    first, second = (np.cov(x.astype(np.float64), rowvar=False).reshape(x.shape[1], -1) for x in (features, reference))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ second @ root), 0)).sum()
    return float(np.sum((means[0] - means[1]) ** 2) + np.trace(first) + np.trace(second) - 2 * cross)
