"""A loss of your own: fastalign dpo --config examples/dpo.yaml --loss.name examples/custom_loss.py:hinge_squared."""

from torch import Tensor

from fastalign.losses.pairs import log_ratios
from fastalign.types import PairLogps


def hinge_squared(pair: PairLogps, *, beta: float = 0.1, margin: float = 1.0) -> Tensor:
    """Squared hinge: a pair is left alone once its reward margin is wide enough, and costs the more the narrower it is.

    ``l = max(0, margin - beta (a - b))^2`` with the log-ratios ``a`` of chosen and ``b`` of rejected.

    Args:
        pair: sequence log-probs of P pairs.
        beta: reward per nat.
        margin: the reward margin wanted.

    Returns:
        ``[P]`` losses.
    """
    chosen, rejected = log_ratios(pair)
    return (margin - beta * (chosen - rejected)).relu().square()
