"""Operations, bytes sent and seconds of a step: counted from the model and modelled from a device's figures."""

from __future__ import annotations

from dataclasses import dataclass

from fastalign.engine.plan.footprint import Footprint
from fastalign.engine.plan.memory import Memory, states
from fastalign.engine.plan.setting import Setting
from fastalign.types import ForwardCost, attended

LINK_SHARE = 0.7
"""Of a link's speed that collectives are assumed to reach."""
UPDATE_BYTES = 28
"""AdamW reads weight, gradient and two moments of 4 bytes each, and writes all but the gradient."""


@dataclass(frozen=True)
class Speed:
    """One step.

    Attributes:
        operations: of one rank, by part.
        sent: bytes that one rank receives, by axis.
        seconds: by part; they add up to the step.
        tokens: logical tokens of the step, a prompt once per answer.
        computed: tokens that the backbone computes in training.
    """

    operations: dict[str, float]
    sent: dict[str, float]
    seconds: dict[str, float]
    tokens: int
    computed: int

    @property
    def step(self) -> float:
        """Seconds."""
        return sum(self.seconds.values())


def cost_of(model: Footprint, trained: bool = False) -> ForwardCost:
    """`models.costs.forward_cost` of one rank's model: experts that a token does not meet are left out."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    counted = [w for w in model.weights if w.matrix and w.block is not None and (w.trained or not trained)]
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = config.num_experts_per_tok / experts if experts else 1.0
    met = sum(w.numel * (share if len(w.shape) == 3 else 1) for w in counted)
    head = model.head.vocab * (model.head.head_trained if trained else model.head.width)
    return ForwardCost(met, 2 * config.num_hidden_layers * config.num_attention_heads * size, head)


def speed(setting: Setting, found: Memory) -> Speed:
    """The step of a setting."""
    group, layout, asked = setting.group, setting.layout, setting.asked
    examples = setting.config.batch.size / layout.data
    work = round(examples * group.tokens), round(examples * pairs(setting)), round(examples * group.rows)
    operations = forward_and_backward(setting, work) | other_passes(setting, work)
    sent = communication(setting, work[0])
    peak = setting.device.half if setting.half else setting.device.single
    seconds = {name: count / (peak * asked.mfu) for name, count in operations.items()}
    fsdp = _seconds(setting, sent.get("fsdp", 0.0), layout.shard * layout.tp)
    fsdp += _seconds(setting, sent.get("dp_replicate", 0.0), layout.ranks)
    computing = sum(seconds.values())
    seconds["tensor parallel all-reduces"] = _seconds(setting, sent.get("tp", 0.0), layout.tp)
    seconds["FSDP beyond what computing hides"] = max(0.0, fsdp - computing)
    seconds["optimizer"] = update_seconds(setting)
    if found.rows:
        seconds["sampling"] = sampling_seconds(setting, found)
    tokens = setting.config.batch.size * group.answers * (group.prompt + group.answer)
    return Speed(operations, sent, {k: v for k, v in seconds.items() if v}, tokens, work[0] * layout.data)


def pairs(setting: Setting) -> int:
    """Pairs of a query and a key in an example."""
    group = setting.group
    answers = group.answers * attended(group.answer, group.prompt)
    return answers + attended(group.prompt) * (1 if group.shared else group.answers)


def forward_and_backward(setting: Setting, work: tuple[int, int, int]) -> dict[str, float]:
    """Operations of what trains: 6 per multiply-add and 4 where frozen; 2 more of layers that are recomputed."""
    found = {}
    for name, model in (("training", setting.policy()), ("training the critic", setting.critic_model())):
        if model is not None:
            every, trained = cost_of(model), cost_of(model, trained=True)
            again = recomputed(setting, model, every, work)
            found[name] = setting.passes * (4 * every.of(*work) + 2 * trained.of(*work) + again)
    return found


def recomputed(setting: Setting, model: Footprint, every: ForwardCost, work: tuple[int, int, int]) -> float:
    """Operations of activations that backward computes again: of whole layers, or of two of an MLP's three products."""
    again, config = setting.config.model.gradient_checkpointing, model.config
    if again == "mlp":
        return 2 * work[0] * 2 * config.hidden_size * config.intermediate_size * model.layers
    return 2 * every.of(work[0], work[1], 0) if again else 0.0


def other_passes(setting: Setting, work: tuple[int, int, int]) -> dict[str, float]:
    """Operations of passes without gradient: reference, log-probs before the update, values, rewards."""
    found, gradient = {}, setting.objective.policy_gradient
    policy = 2 * cost_of(setting.policy()).of(*work)
    if setting.reference == "cached":
        passes = max(setting.config.run.epochs, 1.0) if setting.config.run.steps is None else 1.0
        found["reference, ahead of the run"] = policy / passes
    elif setting.reference != "none":
        other = setting.reference_model()
        found["reference"] = 2 * cost_of(other).of(*work) if other else policy
    if {"baseline", "rank_margins"} & {*setting.objective.columns}:
        found["log-probs of the whole step"] = policy
    if gradient is not None and setting.device.kind == "cuda" and (gradient.num_updates > 1 or gradient.charges_kl):
        found["log-probs before the update"] = policy
    if gradient is not None and setting.critic != "none":
        critic = setting.critic_model() or setting.policy()
        found["values"] = 2 * cost_of(critic).of(work[0], work[1], 0)
    rewards = sum(2 * cost_of(model).of(work[0], work[1], 0) for model in setting.reward_models())
    return found | ({"reward models": rewards} if rewards else {})


def communication(setting: Setting, tokens: float) -> dict[str, float]:
    """Bytes that one rank receives in a step, by axis of the mesh.

    FSDP gathers the weights of every micro-batch twice, for forward and backward, and reduces the gradients of the last
    one of an update: ``(2 b_p micro_batches + b_g) P / tp (d - 1) / d``; with `parallel.shard_gradients` of each. HSDP
    then averages shards over replicas.
    Tensor parallelism sums ``tokens x D`` four times per layer, twice more where layers are recomputed.
    """
    layout, found = setting.layout, {"fsdp": 0.0, "dp_replicate": 0.0, "tp": 0.0}
    updates = setting.updates * setting.passes
    wire = 2 if setting.half else 4
    for model in filter(None, (setting.policy(), setting.critic_model())):
        own, away = states(model, setting), (layout.shard - 1) / layout.shard
        rounds = 2 * setting.micro_batches * updates
        passes = other_rounds(setting) * setting.micro_batches * setting.updates
        reduced = updates * (setting.micro_batches if setting.config.parallel.shard_gradients else 1) * own.reduced
        found["fsdp"] += ((rounds + passes) * own.whole + reduced) * away
        found["dp_replicate"] += 2 * (layout.replicate - 1) / layout.replicate * reduced / layout.shard
        sums = 4 + 2 * (setting.config.model.gradient_checkpointing is True)
        width = model.config.hidden_size * wire * 2 * (layout.tp - 1) / layout.tp
        found["tp"] += tokens * width * model.layers * (sums * setting.passes + 2 * other_rounds(setting))
    if setting.samples and layout.ranks > 1:
        found["sampling"] = received_to_sample(setting)
    return {name: size for name, size in found.items() if size}


def received_to_sample(setting: Setting) -> float:
    """Bytes of weights that a rank receives before it samples: of those that it has only its part of."""
    layout, own = setting.layout, states(setting.policy(), setting).whole
    if layout.tp == setting.sampling_tp:
        return own * (1 - 1 / layout.shard)
    return own * layout.tp * (1 - 1 / (layout.shard * layout.tp))


def other_rounds(setting: Setting) -> int:
    """Passes without gradient per step that gather weights of their own."""
    names = other_passes(setting, (1, 1, 1))
    return len([name for name in names if name not in ("reward models", "reference, ahead of the run")])


def update_seconds(setting: Setting) -> float:
    """AdamW, as fast as memory is read and written."""
    bandwidth = setting.device.bandwidth * setting.asked.bandwidth_share
    models = [model for model in (setting.policy(), setting.critic_model()) if model is not None]
    elements = sum(w.numel for model in models for w in model.weights if w.trained) / setting.layout.shard
    return elements * UPDATE_BYTES * setting.updates * setting.passes / bandwidth


def sampling_seconds(setting: Setting, found: Memory) -> float:
    """Gather the weights; compute prompts; then every token reads all weights and the keys and values of its row."""
    model, device, asked, (prompt, answer) = setting.policy(), setting.device, setting.asked, setting.lengths
    bandwidth, peak = device.bandwidth * asked.bandwidth_share, device.half if setting.half else device.single
    size, own = 2 if setting.half else 4, states(model, setting)
    together = setting.sampling_tp  # ranks that sample the same completions
    tp = setting.layout.tp / together
    whole = own.whole * tp or sum(w.numel for w in model.weights) * size
    prompts = setting.config.batch.size / setting.layout.ranks * together
    cost = cost_of(model)
    rounds = max(1.0, prompts * setting.samples / found.rows)
    cache = found.kinds.get("while sampling: keys and values", 0.0) / 2
    operations = 2 * tp * (cost.per_token + cost.per_scored) * found.rows
    step = max((whole + cache) / bandwidth, operations / (peak * asked.mfu))
    prefill = 2 * tp * cost.of(round(prompts * prompt), round(prompts * attended(prompt)), 0) / (peak * asked.mfu)
    sums = (2 * model.layers + 1) * found.rows * model.config.hidden_size * size * 2 * (together - 1) / together
    step += _seconds(setting, sums, together)
    moving = _seconds(setting, received_to_sample(setting), setting.layout.shard * setting.layout.tp)
    return moving + prefill + rounds * answer * step


def _seconds(setting: Setting, sent: float, ranks: int) -> float:
    """How long it takes to receive so much, within a node or between nodes."""
    near = ranks <= setting.asked.gpus_per_node
    return sent / ((setting.device.link if near else setting.device.network) * LINK_SHARE)
