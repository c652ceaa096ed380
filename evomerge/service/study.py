"""A study from its spec to its end: create or take up again, run, hand over.

Puts the pieces together: store, executor, sampler, controller, mirror. Knows nothing of terminals,
and of models only what a worker's inspection said.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

from evomerge.errors import StudyChanged, StudyNotFound
from evomerge.merging.recipe import ModelRef, Recipe
from evomerge.sampling import make_sampler, versions
from evomerge.sampling.base import Sampler
from evomerge.service.baselines import baselines
from evomerge.service.changes import changes, text_changes
from evomerge.service.controller import CONTROLLER_LEASE_S, Controller, Mirror
from evomerge.service.dispatch import Dispatcher
from evomerge.service.executor import Executor, Setup
from evomerge.service.ledger import Clock, Ledger, utc_now
from evomerge.service.liveness import is_dead, process_start
from evomerge.service.notices import RestartLog, kept_restarts
from evomerge.service.progress import Progress
from evomerge.service.refinement import kept_refinements, refinements_of
from evomerge.service.shares import PoolShare
from evomerge.service.standing import standing, work_done
from evomerge.service.warm_start import good_genomes
from evomerge.space import Gene, load_space
from evomerge.spec import StudySpec
from evomerge.store.base import Controller as Holder
from evomerge.store.base import StudyRecord, StudyStore
from evomerge.store.rules import check_free
from evomerge.trial import Genome, NewTrial, Trial

MakeMirror = Callable[[StudyRecord, Sequence[Gene]], Mirror | None]
"""(study, its genes) -> the mirror to keep up to date, if any."""


@dataclass(frozen=True)
class Models:
    """A study's checkpoints by content, and the dtype that merged models are rounded to.

    `artifact` is there where the space's method applies one.
    """

    base: ModelRef
    sources: Mapping[str, ModelRef]
    dtype: str
    artifact: ModelRef | None = None

    @classmethod
    def of(cls, record: StudyRecord) -> Models:
        spec, digests = record.spec, record.inspection["digests"]
        artifact = spec.get("artifact")  # studies of older versions lack the key
        return cls(
            base=ModelRef(spec["base"], digests[spec["base"]]),
            sources={name: ModelRef(p, digests[p]) for name, p in spec["sources"].items()},
            dtype=record.inspection["dtype"],
            artifact=ModelRef(artifact, digests[artifact]) if artifact else None,
        )


def refuse_early(spec: StudySpec, store: StudyStore, *, clock: Clock = utc_now) -> None:
    """Say what is wrong so far as the spec's text and the store tell, before any worker starts.

    What opens no checkpoint takes no time; `open_study` and `controlling` check again, and all.
    Raises SpecError of the space, StudyChanged, StudyBusy.
    """
    space = load_space(spec.space).to_json()
    known = _known(store, spec.name)
    if known is None:
        return
    _same(spec.name, text_changes(known, spec.model_copy(update={"space": space})))
    holder = store.controller(spec.name)
    if holder is not None and not is_dead(holder):
        check_free(spec.name, holder, "", clock())


def open_study(
    spec: StudySpec, store: StudyStore, executor: Executor, *, clock: Clock = utc_now
) -> StudyRecord:
    """Create the study, or check that the one of that name is the same study.

    A worker inspects checkpoints and tasks first, on a resume too: a source that was trained on,
    or a task file that was edited, would make old and new scores incomparable. Raises SpecError
    with every problem, StudyChanged with every difference.
    """
    asked = _to_inspect(spec, _known(store, spec.name))
    token = uuid.uuid4().hex
    share = PoolShare(store, executor, spec.name, spec.workers, token=token, clock=clock)
    with share.inspecting():
        inspection = dict(executor.inspect(asked.model_dump(mode="json")))
    document = {**spec.model_dump(mode="json"), "space": inspection.pop("space")}
    record = StudyRecord(spec.name, document, inspection, inspection["scorer_digest"], clock())
    known = _known(store, spec.name)
    if known is None:
        start = good_genomes(spec, document, store) | {"sampler": versions(spec.sampler)}
        record = replace(record, inspection=inspection | start)
        store.create_study(record)
        return record
    if (path := spec.sampler.start) != asked.sampler.start:
        inspection["digests"] |= {path: known.inspection["digests"][path]}
    _same(spec.name, changes(known, record))
    # what the study started from stays, whatever has become of earlier studies and artifacts since
    start = {k: v for k, v in known.inspection.items() if k in ("warm_start", "start", "sampler")}
    start |= kept_restarts(known) | kept_refinements(known)
    return replace(record, inspection=inspection | start, created_at=known.created_at)


def _same(study: str, differences: list[str]) -> None:
    if differences:
        lines = "\n".join(f"  - {line}" for line in differences)
        raise StudyChanged(
            f"study {study!r} exists with another spec; only budget and workers (not "
            "workers.num_cpus: threads change rounding) may change. Give this one another name, "
            f"or put back:\n{lines}"
        )


def _known(store: StudyStore, name: str) -> StudyRecord | None:
    try:
        return store.study(name)
    except StudyNotFound:
        return None


def _to_inspect(spec: StudySpec, known: StudyRecord | None) -> StudySpec:
    """The spec without what the study has its genome of already: that artifact may be gone."""
    start = spec.sampler.start
    if known is None or start is None or known.spec["sampler"].get("start") != start:
        return spec
    return spec.model_copy(update={"sampler": spec.sampler.model_copy(update={"start": None})})


@contextlib.contextmanager
def controlling(record: StudyRecord, store: StudyStore, clock: Clock = utc_now) -> Iterator[str]:
    """Be the study's controller for the length of a `with`; yields the fencing token.

    A controller of this host that is dead is replaced at once, one elsewhere when its lease lapses.
    Raises StudyBusy while another one lives.
    """
    now = clock()
    until = now + timedelta(seconds=CONTROLLER_LEASE_S)
    pid = os.getpid()
    me = Holder(uuid.uuid4().hex, socket.gethostname(), pid, process_start(pid) or 0.0, until)
    holder = store.controller(record.name)
    store.acquire(record.name, me, now=now, force=holder is not None and is_dead(holder))
    store.update_study(record.name, record.spec, record.inspection, controller=me.token)
    try:
        yield me.token
    finally:
        store.release(record.name, me.token)
        store.withdraw(record.name, me.token)


def build_controller(
    record: StudyRecord,
    store: StudyStore,
    executor: Executor,
    token: str,
    *,
    make_mirror: MakeMirror = lambda record, genes: None,
    watch: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda text: None,
    clock: Clock = utc_now,
    time_s: Callable[[], float] = time.monotonic,
) -> Controller:
    """The controller of a study, its baselines recorded, ready to run.

    `watch` is shown where the study stands, `note` what is worth a line of its own.
    """
    spec = StudySpec.model_validate(record.spec)
    models, space = Models.of(record), load_space(record.spec["space"])
    genes = space.genes(list(models.sources))
    mirror = make_mirror(record, genes)

    def loaded(trials: Sequence[Trial]) -> None:
        if mirror is not None:
            mirror.sync(trials)
        # a long study takes a while to read
        until = clock() + timedelta(seconds=CONTROLLER_LEASE_S)
        store.renew(record.name, token, lease_until=until)

    ledger = Ledger(store, record, token, clock=clock, show=loaded)
    if not len(ledger):
        ledger.create(_baselines(record, models))
    if refined := _refined(record, ledger):
        ledger.create(refined)
    fingerprint = record.inspection["fingerprint"]
    executor.prepare(Setup(record.spec, record.inspection["digests"], models.dtype, fingerprint))
    share = PoolShare(store, executor, record.name, spec.workers, token=token, clock=clock)
    work_before, started_s = work_done(spec, ledger.counts_before), time_s()

    started = record.inspection.get("start")
    sampler = make_sampler(
        spec.sampler,
        genes=len(genes),
        init=started["genome"] if started else space.start(list(models.sources)),
        init_first=started is not None,
        objectives=len(spec.objective.tasks) if spec.objective.aggregate == "pareto" else 1,
        gene_names=[gene.name for gene in genes],
        levels=[gene.levels for gene in genes],
        promising=record.inspection.get("warm_start", ()),
    )
    faults = _idle_workers(spec, sampler), _few_candidates(spec, genes), _other_versions(record)
    for fault in faults:
        if fault:
            note(fault)
    log = RestartLog(store, record, token, sampler, note)

    def show(ledger: Ledger, running: int) -> None:
        elapsed_s = time_s() - started_s
        log.update()
        watch(standing(spec, ledger.trials, counts=ledger.counts, running=running,
                       elapsed_s=elapsed_s, work_before=work_before))  # fmt: skip

    return Controller(
        spec,
        ledger,
        sampler,
        Dispatcher(spec, ledger, executor),
        _proposer(decoder(record)),
        mirror=mirror,
        watch=show,
        claim=lambda wanted, held: share.renew(wanted, held, CONTROLLER_LEASE_S),
        time_s=time_s,
    )


def _other_versions(record: StudyRecord) -> str | None:
    """What to say of a study whose sampler is not the one that it was started with, if so."""
    here = versions(StudySpec.model_validate(record.spec).sampler)
    before = record.inspection.get("sampler", here)
    differ = (name for name in before if here.get(name) != before[name])
    changed = [f"{name} {before[name]} -> {here.get(name)}" for name in differ]
    if not changed:
        return None
    return (
        f"the sampler is not the one that the study was started with ({', '.join(changed)}):"
        " nothing is lost, but the search goes on otherwise than it would have"
    )


def _idle_workers(spec: StudySpec, sampler: Sampler) -> str | None:
    """What to say of a new sampler that never proposes enough for all workers, if it does not."""
    most, count = sampler.horizon, spec.workers.count
    if most >= min(count, spec.budget.trials):
        return None
    return (
        f"study {spec.name}: no more than {most} of {count} workers will be busy, as many as "
        f"schedule {spec.sampler.schedule!r} proposes at once; a study with "
        "`schedule: asynchronous` or a larger `population` uses all"
    )


def _few_candidates(spec: StudySpec, genes: Sequence[Gene]) -> str | None:
    """What to say of a search that has more trials than there are candidates, if it has."""
    count = math.prod(gene.levels for gene in genes)  # 0 where a gene is continuous
    if not 0 < count < spec.budget.trials:
        return None
    return (
        f"study {spec.name}: the space has {count} candidates, fewer than the {spec.budget.trials} "
        "trials of the budget; the rest repeat them, answered from the store"
    )


def decoder(record: StudyRecord) -> Callable[[Genome], Recipe]:
    """What a genome of the study stands for."""
    models, space = Models.of(record), load_space(record.spec["space"])

    def decode(genome: Genome) -> Recipe:
        return space.decode(
            genome,
            base=models.base,
            sources=models.sources,
            dtype=models.dtype,
            seed=record.spec["sampler"]["seed"],
            artifact=models.artifact,
        )

    return decode


def _proposer(decode: Callable[[Genome], Recipe]) -> Callable[[int, int, Genome], NewTrial]:
    def propose(number: int, index: int, genome: Genome) -> NewTrial:
        recipe = decode(genome)
        return NewTrial(
            number, "search", f"trial {number}", genome, recipe.to_json(), recipe.digest
        )

    return propose


def _baselines(record: StudyRecord, models: Models) -> list[NewTrial]:
    found = record.inspection.get("published")
    published = Recipe.from_json(found) if found else None
    return baselines(models.base, models.sources, models.dtype, published=published)


def _refined(record: StudyRecord, ledger: Ledger) -> list[NewTrial]:
    """The trials of refinements that have none yet."""
    made = sum(trial.kind == "refined" for trial in ledger.trials)
    decode, trials = decoder(record), list[NewTrial]()
    for number, refinement in enumerate(refinements_of(record)[made:], len(ledger)):
        recipe, label = decode(refinement.genome), f"refined from trial {refinement.origin}"
        trials.append(
            NewTrial(number, "refined", label, refinement.genome, recipe.to_json(), recipe.digest)
        )
    return trials
