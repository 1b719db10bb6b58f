"""Training, top to bottom: set-up; then micro-batches, loss, gradients, optimizer and one line of metrics per step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from fastalign.config import BatchConfig, Config, as_dict
from fastalign.data.examples import TokenExample
from fastalign.data.loader import Examples, Rows, Source, TokenDataset
from fastalign.data.pack import empty_batch, share
from fastalign.disk import kept_from_others
from fastalign.engine import agreement, best
from fastalign.engine.evaluate import evaluate, metrics_of
from fastalign.engine.feed import Feed
from fastalign.engine.forward import Models
from fastalign.engine.interrupt import ORDER, Interrupted, Requests, handled
from fastalign.engine.keeper import Keeper, Record
from fastalign.engine.loading import Start
from fastalign.engine.methods import Objective, filled_in, minibatches_of, objective_of
from fastalign.engine.onpolicy import (
    cut_samples,
    follow,
    kept,
    make_scorer,
    make_source,
    sampled,
)
from fastalign.engine.optim import Trained, learning_rate, make_optimizer
from fastalign.engine.output.accounting import Accounting, account
from fastalign.engine.output.checkpoint import expected_size, load_checkpoint
from fastalign.engine.output.checkpoints import Found, Retention
from fastalign.engine.output.console import open_sinks
from fastalign.engine.output.export import export, report, whole_weights
from fastalign.engine.output.metrics import MetricsLog, StepResult
from fastalign.engine.output.overview import show_overview
from fastalign.engine.output.rundir import ROUNDED, claim, held, is_own, make_room, open_rundir, warn_of_open_places
from fastalign.engine.output.saver import Saver
from fastalign.engine.output.snapshot import take_snapshot
from fastalign.engine.prepare import Carried, first_carried, prepare, weigh_for
from fastalign.engine.settings import check_alone, check_sampling, check_settings, check_types, settle
from fastalign.engine.setup import (
    hash_tokens,
    horizon,
    load_data,
    load_models,
    require_same_rows,
    seed_everything,
    what_is_read,
)
from fastalign.engine.timing import Stopwatch, peak_memory
from fastalign.engine.update import Work, extremes_of, make_updates, measure_work, total
from fastalign.models.policy import Policy
from fastalign.parallel.mesh import World, world
from fastalign.parallel.whereabouts import NOW, doing
from fastalign.rl.rollouts import Rollouts
from fastalign.types import PackedBatch

log = logging.getLogger(__name__)


def train(config: Config, on_step: Callable[[int], None] | None = None) -> str:
    """Run a whole training job and leave its directory: config, metrics, checkpoints, model, report.

    Args:
        config: every setting; see `fastalign.config`.
        on_step: called with the number of steps done: before the first step, and after each.

    Returns:
        what a user must know of the end of the run; empty when all went well.

    Raises:
        ValueError: a setting, a file or a batch that cannot be used, in one line that says what to do.
        OSError: a file cannot be written, or another rank was waited for in vain.
        Interrupted: a signal ended the run; its text says how to go on.
    """
    check_types(config)
    objective = objective_of(config)
    config = filled_in(config, objective)
    check_settings(config)
    check_sampling(config)
    with handled() as signals, kept_from_others(), ExitStack() as to_the_end:
        with world(config.parallel) as ranks:
            to_the_end.enter_context(held(Path(config.run.output_dir), ranks, shared=config.run.shared_disk))
            signals.where = "before step 1"
            warn_of_open_places(config, ranks)
            config = settle(config, ranks.device)
            checkpoint = claim(config, ranks)
            if checkpoint:
                signals.where, signals.rest = f"before it went on from {checkpoint.path}", "nothing new to save"
            seed_everything(config.run)
            job = replace(set_up(config, objective, ranks, checkpoint), signals=signals)
            done = resume(job, checkpoint) if checkpoint else 0
            if open_rundir(config, done, ranks, checkpoint and checkpoint.path) == done:  # the first change on the disk
                job.owed.clear()  # the line is there
            if ranks.is_main:
                cut_samples(job.directory, done)
            show_overview(job, done)
            note = run(job, done, on_step or (lambda step: None))
            weights = whole_weights(job.models.policy) if ranks.size > 1 else None
        if ranks.is_main:  # the others are done: nobody waits for what the disk takes
            export(job, weights)
            report(job)
    return note


def next_parts(job: Job, keeper: Keeper, feed: Feed, step: int) -> list[list[PackedBatch]]:
    """The next step's micro-batches; where sampling or scoring them fails, the steps before are saved."""
    try:
        return feed.peek()
    except ValueError as error:
        if step == 1 or not (isinstance(job.source, Rollouts) or job.config.optim.in_backward):
            raise
        raise failed(keeper, f"step {step}: {error}", step - 1) from error


def failed(keeper: Keeper, text: str, step: int, record: Record | None = None) -> ValueError:
    """What ends a run whose completions could not be sampled or scored, once the steps so far are saved."""
    keeper.save(step, record)
    return ValueError(f"{text}; saved {keeper.path(step)}, go on with run.resume=true")


@dataclass(frozen=True)
class Job:
    """All that a run needs, made once."""

    config: Config
    objective: Objective
    world: World
    tokenizer: PreTrainedTokenizerBase
    models: Models
    trained: dict[str, Trained]
    dataset: TokenDataset
    batch: BatchConfig
    """The batch section, without prefix sharing where a model does not compute it exactly."""
    source: Source
    held_out: Examples | None
    total: int
    accounting: Accounting
    held_out_counts: dict[str, int] | None = None
    carried: Carried = field(default_factory=first_carried)
    signals: Requests = field(default_factory=Requests)
    owed: list[Record] = field(default_factory=list)
    """The record of the step that is resumed from, where its evaluation is still to come."""

    @property
    def directory(self) -> Path:
        """Where it writes."""
        return Path(self.config.run.output_dir)

    @cached_property
    def data_content(self) -> str:
        """What the checkpoints know the training data by."""
        return hash_tokens(self.dataset)


def set_up(
    config: Config, objective: Objective, ranks: World, checkpoint: Found | None = None, *, writes: bool = True
) -> Job:
    """Tokenizer, data, policy, reference and optimizer; the first packed batch is checked against the plain forward.

    Without ``writes`` no checkpoint will follow, and the run directory is left as it is.
    """
    tokenizer, dataset, held_out = load_data(config)
    require_same_rows(ranks, dataset, held_out)
    total, rows = horizon(config, len(dataset), checkpoint)
    demands = what_is_read(config, dataset, held_out, total, rows)
    done = checkpoint.state["step"] if checkpoint else 0

    def room(policy: Policy, critic: Policy | None) -> None:
        if writes:
            trained = [policy, critic] if critic else [policy]
            follows = config.algorithm is not None and config.algorithm.reference_sync != "none"
            need = expected_size(trained, config.optim, [policy] if follows else [])
            make_room(config, need, done, total, ranks)

    scorer = make_scorer(config, objective, tokenizer, ranks)
    evaluated = None if held_out is None else metrics_of(objective, scorer.names if scorer else ())
    best.check(config.run.keep_best, evaluated)
    loaded = load_models(Start(config, objective, tokenizer, demands, ranks), room)
    models, batch, (data, *rest) = loaded.models, loaded.batch, loaded.data
    known = (ranks.data.size, ranks.device, models.autocast, ranks.size // ranks.data.size)
    accounting = account(models.policy, batch.budget, *known)
    if scorer is None:
        source: Source = Rows(data, batch.size, config.run.seed, rows)
    else:
        source = make_source(config, objective, models, dataset, rows, tokenizer, scorer, ranks)
    counts = None if held_out is None else held_out.counts
    held_out = next(iter(rest), None)  # the same rows, with their log-probs
    trained = what_trains(models, config, ranks)
    made = (tokenizer, models, trained, dataset, batch, source, held_out, total, accounting, counts)
    return Job(config, objective, ranks, *made)


def what_trains(models: Models, config: Config, ranks: World) -> dict[str, Trained]:
    """The modules that train with their optimizers, by role."""
    modules = {"policy": models.policy, "critic": models.critic}
    present = {role: module for role, module in modules.items() if module is not None}
    return {role: Trained(m, make_optimizer(m, config.optim, tell=ranks.is_main)) for role, m in present.items()}


def run(job: Job, done: int, on_step: Callable[[int], None]) -> str:
    """The loop, from step ``done + 1`` to the last; returns what its last line must say beside."""
    every = job.config.run
    with (
        open_metrics(job, done) as metrics,
        closing(job.source),
        closing(make_feed(job)) as feed,
        closing(Saver(job.config, job.world)) as saver,
    ):
        write = partial(save, job, feed, saver)
        keeper = Keeper(job.config, job.world, job.signals, metrics, write, saver, done, job.total)
        with keeper.listening(), doing("loop"):
            for record in job.owed:
                evaluate_step(job, keeper, done, record)
            on_step(done)
            for step in range(done + 1, job.total + 1):
                result = iteration(job, keeper, feed, step)
                saves = is_due(step, every.save_every, job.total)
                if job.held_out is not None and is_due(step, every.eval_every, job.total):
                    record = metrics.read(result)
                    if saves:  # before the evaluation, so that nothing is lost if that fails
                        keeper.save(step, record)
                    evaluate_step(job, keeper, step, record)
                else:
                    metrics.add(result)
                    if saves:
                        keeper.save(step)
                if job.world.device.type == "cpu" or is_due(step, every.log_every, job.total):
                    metrics.flush()
                on_step(step)
            keeper.look(job.total)
            saver.finish()
        return metrics.alarms.note


def make_feed(job: Job) -> Feed:
    """The steps of the run, packed."""
    return Feed(job.source, partial(pack_share, job), ahead=job.world.device.type == "cuda")


@contextmanager
def open_metrics(job: Job, done: int) -> Iterator[MetricsLog]:
    """The metrics file, and on the main rank the console and the trackers."""
    run = job.config.run
    with ExitStack() as stack:
        sinks = open_sinks(run.trackers, job.directory, as_dict(job.config), job.total, done, run.log_every)
        opened = stack.enter_context(sinks) if job.world.is_main else []
        yield stack.enter_context(
            closing(MetricsLog(job.directory / "metrics.jsonl", job.objective, job.world, opened, job.accounting.peak))
        )


def iteration(job: Job, keeper: Keeper, feed: Feed, step: int) -> StepResult:
    """One step: its examples, the updates made of them, one line of metrics; nothing is read back from the device."""
    parts, work, watch = draw(job, keeper, feed, step)
    lr = learning_rate(step, job.total, job.config.optim)
    flat = [batch for part in parts for batch in part]
    exact = isinstance(job.source, Rollouts) and job.source.sampler.exact
    flat = prepare(job.models, flat, job.objective, work, job.world, watch, job.carried, exact=exact)
    known = {"step": step, "epoch": feed.position["drawn"] / len(job.dataset), "lr": lr}
    if isinstance(job.source, Rollouts):
        known |= sampled(job, keeper.metrics, job.source, step, flat, work)
    updates = make_updates(job, cut(job, flat, parts), step, lr, watch)
    follow(job, step)
    with watch("generate"):
        job.source.after(job.models.policy, step)
    watch.stop()
    norm = torch.stack([one.grad_norm for one in updates]).mean()
    losses = [loss for one in updates for loss in one.losses]
    known |= job.accounting.describe(work)
    return StepResult(known, total(job.objective, updates), norm, losses, watch, extremes_of(updates))


def cut(job: Job, batches: list[PackedBatch], parts: list[list[PackedBatch]]) -> list[list[PackedBatch]]:
    """The prepared micro-batches of each update; of several, the weights count what that update has."""
    if len(parts) == 1:
        return [batches]
    ends = pairwise(accumulate(map(len, parts), initial=0))
    each = [batches[start:stop] for start, stop in ends]
    works = [measure_work(part, job.world, 0) for part in each]
    return [
        [weigh_for(job.objective, work, job.world, batch) for batch in part]
        for part, work in zip(each, works, strict=True)
    ]


def pack_share(job: Job, examples: list[TokenExample]) -> list[list[PackedBatch]]:
    """A step's examples as this rank's micro-batches, update by update, pinned where a GPU will read them."""
    batch, ranks, number = job.batch, job.world.data, minibatches_of(job.objective)
    each = [examples[first::number] for first in range(number)]
    known = batch.share_prefix, ranks.rank, ranks.size, job.accounting.forward
    parts = [share(some, batch.budget, *known) for some in each if some] or [[empty_batch()]]
    if job.world.device.type == "cuda":
        parts = [[one.pin_memory() for one in part] for part in parts]
    check_alone(max(map(len, parts)), job.config)
    return parts


def draw(job: Job, keeper: Keeper, feed: Feed, step: int) -> tuple[list[list[PackedBatch]], Work, Stopwatch]:
    """The next step's micro-batches, what all ranks compute, and its clock; what a rank was asked for comes first."""
    while True:
        watch = Stopwatch(job.world.device)
        NOW.step = step
        with watch("data"):
            parts, memory = next_parts(job, keeper, feed, step), peak_memory(job.world.device)
            flat = [batch for part in parts for batch in part]
            reads = job.world.device.type == "cpu" or is_due(step - 1, job.config.run.log_every, job.total)
            modules = [one.module for one in job.trained.values()] if reads else []
            vitals = [*keeper.metrics.vitals, agreement.some_of(modules, step - 1, job.world)]
            work = measure_work(flat, job.world, memory, keeper.asked(step - 1), vitals)
            agreement.check(work.vitals, step - 1, job.world)
        if isinstance(job.source, Rollouts):
            for part, seconds in job.source.take_seconds().items():
                watch.book(part, seconds)
        if not work.asked:
            feed.take()
            return parts, work, watch
        keeper.obey(work.asked, step - 1)  # what is saved has not had this step


def evaluate_step(job: Job, keeper: Keeper, step: int, record: Record) -> None:
    """Write a step's line with its ``eval_`` metrics; a run that is stopped meanwhile leaves them to its resume."""
    assert job.held_out is not None
    ours = job.models, job.held_out, job.objective, job.batch, job.world, job.carried
    try:
        with doing("evaluation"):
            if isinstance(job.source, Rollouts):
                metrics = job.source.evaluate(cast(Any, job.held_out), between=partial(keeper.look, step))
            else:
                metrics = evaluate(*ours, between=partial(keeper.look, step))
    except Interrupted as stop:
        keeper.obey(ORDER.index(stop.code - 128), step, record)
        raise
    except ValueError as error:
        if not isinstance(job.source, Rollouts):
            raise
        raise failed(keeper, f"the evaluation after step {step}: {error}", step, record) from error
    evaluated = {f"eval_{name}": value for name, value in metrics.items()}
    keeper.metrics.write({**record, **evaluated})
    keeper.rate(step, evaluated)


def save(job: Job, feed: Feed, saver: Saver, step: int, owed: Record | None, retention: Retention) -> None:
    """A checkpoint of everything that the next step depends on, and of a step's line that awaits its evaluation."""
    carried, config = {name: part.state_dict() for name, part in job.carried.items()}, as_dict(job.config)
    state = {"loader": feed.position, "data": job.data_content, "carried": carried, "config": config}
    state |= {"base": job.models.policy.base_digest, "reference": job.models.reference_digest, "owed": owed}
    snapshot = take_snapshot(step, kept(job), state, job.world)
    with doing("checkpoint"):
        agreement.check_whole(snapshot.tensors, step, job.world)
        saver.save(snapshot, retention)


def resume(job: Job, found: Found) -> int:
    """Go back to a checkpoint; returns its step. The reference is the initial policy, so it needs none."""
    checkpoint, state = found
    job.source.load_state_dict(state["loader"])
    if state["data"] != job.data_content:
        raise ValueError(
            f"{checkpoint} was trained on other data: as many examples, but other tokens or another order; "
            "resume with the same rows and tokenizer, or choose another run.output_dir"
        )
    if state.get("base") != job.models.policy.base_digest:
        raise ValueError(
            f"{checkpoint} was trained over other frozen weights: resume with the base that model.path had then"
        )
    if state.get("reference") not in (None, job.models.reference_digest):
        setting = "reference.path" if job.config.reference.path else "model.path, the reference of this loss,"
        raise ValueError(
            f"{checkpoint} was trained against another reference: {setting} has other weights now; restore those of "
            "then, or start again in another run.output_dir"
        )
    for name, part in job.carried.items():
        if name in state["carried"]:
            part.load_state_dict(state["carried"][name])
    load_checkpoint(checkpoint, kept(job), job.world, shared=job.config.run.shared_disk)
    job.source.after(job.models.policy, state["step"])
    log.info("resumed from %s", checkpoint)
    if state["world_size"] != job.world.size:
        was, now = state["world_size"], job.world.size
        told = "resume: %d rank(s) before, %d now: weights, moments and the position in the data are those of then; %s"
        log.warning(told, was, now, ROUNDED)
    if state.get("owed") and is_own(checkpoint, job.directory):
        job.owed.append(state["owed"])
    return state["step"]


def is_due(step: int, every: int, last: int) -> bool:
    """At every so many steps, and at the last; ``every`` 0 leaves the last alone."""
    return step == last or (every > 0 and step % every == 0)
