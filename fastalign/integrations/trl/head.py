"""TRL's fused head replaced by ours, in one place, until it is undone.

TRL's trainers compute the log-probs of policy, reference and KL batch through one function, which it looks up in
``trl.trainer.utils`` at every call. That name is replaced, and with it the rule that on a CPU every padded row is
projected: rows that are not scored are dropped first, as TRL does on a GPU.
"""

from __future__ import annotations

from importlib import import_module, metadata
from types import SimpleNamespace

from torch import Tensor

from fastalign.integrations._fields import Scaling, head_fields
from fastalign.integrations._patch import Patch
from fastalign.models.head import Head

SUPPORTED = "1.16"
UTILS = "trl.trainer.utils"
FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def patch() -> Patch:
    """Routes the log-probs of TRL's SFT, DPO, KTO, GRPO and RLOO trainers through ``linear_logps``.

    It holds for every trainer of this process, whenever it was made, until the handle's ``undo`` or the end of a
    ``with`` block; patches may nest. Losses and metrics are TRL's own.

    Returns:
        The handle.

    Raises:
        ValueError: TRL is not installed, or in a version other than 1.16.
    """
    check_version()
    theirs = import_module(UTILS)._use_triton
    return Patch(
        {
            (UTILS, "_ChunkedLogProbFunction"): SimpleNamespace(apply=fused_head),
            (UTILS, "_use_triton"): lambda device: device.type == "cpu" or theirs(device),
        }
    )


def check_version() -> None:
    """Refuse every version of TRL but the supported one."""
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError:
        version = "none"
    if version.split(".")[:2] != SUPPORTED.split("."):
        raise ValueError(
            f"fastalign.integrations.trl supports trl {SUPPORTED}.*, found {version}: pip install 'trl=={SUPPORTED}.*'"
        )


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = FIELDS,
) -> tuple[Tensor | None, ...]:
    """What TRL 1.16 calls ``ChunkedLogProbFunction.apply``: five fields ``[N]``; ``chunk_size`` is ours to choose."""
    if hasattr(weight, "ds_id"):
        raise ValueError("a head partitioned by DeepSpeed ZeRO-3 is not served: undo the patch, or use FSDP2")
    scaling = Scaling(temperature, final_logit_softcapping, logit_scale)
    return head_fields(hidden, Head(weight, bias), targets, scaling, outputs)
