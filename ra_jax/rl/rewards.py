"""From three scores to one reward.

Each score s ∈ [0, 1] (removal, background, smoothness) is mapped to 2s − 1, weighed and summed.
"""

import numpy as np

SCORES = ("removal", "background", "smoothness")


def total_reward(scores, weights):
    """Σ_i w_i·(2·s_i − 1) over the last axis; scores [..., 3] in [0, 1] -> [...], in [−Σw, Σw]."""
    return (2.0 * scores - 1.0) @ np.asarray(weights, np.float32)
