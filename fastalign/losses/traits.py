"""What the engine must know of a loss besides its formula: stated once, where the loss is listed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Sums = Mapping[str, tuple[float, float]]
"""(sum, count) of each metric over a step."""


@dataclass(frozen=True)
class Loss:
    """A loss function with its traits; called, it is the function.

    Attributes:
        fn: the function; its keyword-only arguments are the settings of the section ``loss``.
        aliases: other names for it, such as TRL's.
        reference: it reads the log-probs of a reference.
        distributions: it reads the whole distributions of policy and reference.
        tails: it reads the tails of `PairLogps`.
        columns: what it reads of the whole step: columns that are filled before the first backward, in this order.
        baseline: makes the step's baseline that the loss measures from.
        mismatched: that baseline is of prompts with completions of other examples.
        per_token: it is a mean over scored tokens, else over examples.
        length_normalised: its reward is per token.
        nonnegative: settings that weigh a part of it; below 0 that part would grow without bound.
        rows: the kind of rows it reads (a key of ``data.formats.ROWS``), where that is not its method's.
        read: from a scalar head's outputs to its arguments and metrics.
        metrics: its own metrics, beside those of its family.
        flags: what its command needs to run on the example's data.
        sequences: it is of whole sequences and takes their offsets.
    """

    fn: Callable[..., Tensor]
    _: KW_ONLY
    aliases: tuple[str, ...] = ()
    reference: bool = True
    distributions: bool = False
    tails: bool = False
    columns: tuple[str, ...] = ()
    baseline: Callable[..., Any] | None = None
    mismatched: bool = False
    per_token: bool = False
    length_normalised: bool = False
    nonnegative: tuple[str, ...] = ()
    rows: str | None = None
    read: Callable[..., Any] | None = None
    metrics: Callable[..., dict[str, Tensor]] | None = None
    flags: str = ""
    sequences: bool = False

    def __call__(self, *data: Any, **options: Any) -> Tensor:
        """The losses."""
        return self.fn(*data, **options)


@dataclass(frozen=True)
class Family:
    """The losses of one file, which read the same data.

    Attributes:
        title: heading on the page of methods.
        about: what all of them read and what their symbols mean.
        watch: metrics to watch, and what they should do.
        losses: the dict at the foot of the file, the default first.
        derive: metrics that follow from the sums of others, and None for those that are not to be told themselves.
        example: the file that its commands name; default: ``examples/METHOD.yaml``.
    """

    title: str
    about: str
    watch: str
    losses: Mapping[str, Loss]
    derive: Callable[[Sums], Mapping[str, float | None]] = lambda sums: {}
    example: str | None = None


@cache
def keywords(loss: Callable[..., Tensor]) -> dict[str, Any]:
    """The keyword-only arguments of a loss with their defaults: its part of the configuration."""
    parameters = inspect.signature(function_of(loss)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def function_of(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The plain function of a loss."""
    return loss.fn if isinstance(loss, Loss) else loss


def canonical(losses: Mapping[str, Loss]) -> dict[str, str]:
    """Every name that is understood, with the one in ``losses``."""
    return {word: name for name, loss in losses.items() for word in (name, *loss.aliases)}
