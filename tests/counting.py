"""Predictions and blocks as the report's reader counts them, for the tests of the estimators."""

import numpy as np

from mlp_jax.analysis import crossed, predictions


def count_predictions(blocks, labels, *, n_classes=10):
    """PredictionCounts of blocks of predictions, integers [r, n] of any r."""
    labels = np.asarray(labels).astype(np.int64)
    sums = np.zeros((labels.size, n_classes), np.int64), np.zeros((2, labels.size), np.int64)
    correct = [predictions.count_block(block, labels, *sums) for block in blocks]
    return predictions.PredictionCounts(labels, *sums, *np.concatenate(correct, axis=1))


def sum_blocks(blocks):
    """BlockSums of blocks of correctness, bool [2^k, n]."""
    blocks = [np.asarray(block) for block in blocks]
    contrasts, squares = zip(*map(crossed.sum_block, blocks), strict=True)
    return crossed.BlockSums(np.stack(contrasts), np.stack(squares), blocks[0].shape[1])


def squared_contrasts(scores):
    """c_u^2 = (sum +-y)^2 / 2^k of scores [B, 2, ...], in their unit squared."""
    k = scores.ndim - 1
    return crossed.contrasts(scores, k).astype(np.float64) ** 2 / 2**k
