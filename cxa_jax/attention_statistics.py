"""Whether an attention map still says something: three numbers an epoch, and the quantiles behind them."""

import numpy as np

SATURATED = (0.01, 0.99)  # W below or above: the sigmoid's gradient is a hundredth, and falls
QUANTILES = (5, 50, 95)  # percent


def summarize_attention(attention_logits: np.ndarray, attention: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Summarise the attention of a split.

    Args:
      attention_logits: z, [N, h, w].
      attention: W, [N, h, w] in [0, 1].
      weights: p of the pooling, [N, h, w], non-negative, each image's sum 1.

    Returns:
      `attention_z_p05`, `_p50` and `_p95`: quantiles of z over cells and images. `attention_cells`: the effective
      number of cells, 1 / sum p^2, its mean over images, from 1 (one cell) to h w (the plain average).
      `attention_saturated`: the share of cells with W outside SATURATED.
    """
    quantiles = np.percentile(attention_logits.astype(np.float64), QUANTILES)
    weights = weights.reshape(len(weights), -1).astype(np.float64)
    low, high = SATURATED
    return {
        **{f"attention_z_p{q:02d}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)},
        "attention_cells": float(np.mean(1 / np.sum(weights**2, axis=1))),
        "attention_saturated": float(np.mean((attention < low) | (attention > high))),
    }


def describe_attention(summary: dict[str, float], num_cells: int) -> str:
    """Return what `summarize_attention` found, in words, beside the number of cells."""
    return (
        "z {attention_z_p05:.2f} | {attention_z_p50:.2f} | {attention_z_p95:.2f} (5, 50, 95 %), "
        "{attention_cells:.1f} of {num_cells} cells in effect, {attention_saturated:.0%} saturated"
    ).format(num_cells=num_cells, **summary)
