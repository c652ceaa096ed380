"""The mirror: finished trials as an Optuna study in the same database, for optuna-dashboard.

A projection, never read back: the store is the truth, and a mirror that was cut off is completed
by the next `sync`. Each call adds what is missing in one transaction, keyed by the user attribute
`evomerge_number`, so a trial is never there twice.

Optuna's own call spends 2 ms of CPU on a trial, 1 ms more on each parameter and 0.5 ms on each
attribute, so rows go into its tables directly (0.3 ms for all); a test compares what both ways
leave behind. For a schema of Optuna's that is not the one known here, its own call is used.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    distribution_to_json,
)
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from evomerge.errors import StoreError, StoreUnreachable
from evomerge.space.scales import level_of
from evomerge.store import IN_MEMORY
from evomerge.store.engine import (
    LOCK_WAIT_S,
    CommitUnknown,
    make_engine,
    store_error,
    transaction,
)
from evomerge.trial import Genome, State, Trial

KEY = "evomerge_number"
MAX_PARAMETERS = 30  # the dashboard's answer grows with each: 300 of them make it 22 MB
_KNOWN_SCHEMA = "v3.2.0.a"
_TABLES = ("studies", "trials", "trial_values", "trial_params", "trial_user_attributes")
_OPTUNAS_OWN = (OperationalError, optuna.exceptions.StorageInternalError)
_UNIT = FloatDistribution(0.0, 1.0)
_STATES = {
    State.COMPLETE: TrialState.COMPLETE,
    State.PRUNED: TrialState.PRUNED,
    State.FAIL: TrialState.FAIL,
}


def open_storage(url: str) -> RDBStorage:
    """Optuna's storage at a store's URL; its tables are created if they are missing.

    Raises StoreError.
    """
    if url == IN_MEMORY:
        raise StoreError("a memory:// store has no database that Optuna could open")
    wait = {"timeout": LOCK_WAIT_S} if sa.make_url(url).get_backend_name() == "sqlite" else {}
    try:
        return RDBStorage(url, engine_kwargs={"connect_args": wait})
    except (SQLAlchemyError, RuntimeError, optuna.exceptions.StorageInternalError) as error:
        said = error if isinstance(error, sa.exc.DBAPIError) else error.__cause__
        if isinstance(said, sa.exc.OperationalError):  # a lock, a full disk
            raise store_error(make_engine(url), said) from None
        reason = " ".join(str(error).split())
        shown = sa.make_url(url).render_as_string(hide_password=True)
        raise StoreError(f"{shown}: Optuna cannot use this database: {reason}") from None


class OptunaMirror:
    """The Optuna study `study_name` in the database at `url`, created if it is missing.

    `directions` objectives are all maximised. The first `MAX_PARAMETERS` genes appear as Optuna
    parameters, those with `values` (by name) as one of them, the others in [0, 1]; a study's whole
    genomes are in the store alone. One process at a time mirrors a study: its controller. Raises
    StoreError.
    """

    def __init__(
        self,
        url: str,
        study_name: str,
        *,
        directions: int,
        gene_names: Sequence[str],
        values: Mapping[str, Sequence[bool | float | str]] | None = None,
        metric_names: Sequence[str] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = open_storage(url)
        self._genes = tuple(gene_names)[:MAX_PARAMETERS]
        self._values = {k: tuple(v) for k, v in (values or {}).items() if k in self._genes}
        self._distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(self._values[name]) if name in self._values else _UNIT
            for name in self._genes
        }
        self._study_id = _open_study(self._storage, study_name, directions, metric_names)
        self._engine = make_engine(url)
        self._tables: dict[str, sa.Table] | None = None
        if self._storage.get_current_version() == _KNOWN_SCHEMA:
            found = sa.MetaData()
            found.reflect(self._engine, only=_TABLES)
            self._tables = {name: found.tables[name] for name in _TABLES}
        self._done: set[int] | None = self._mirrored()
        self._waiting: dict[int, Trial] = {}  # offered while the connection was broken

    def close(self) -> None:
        """Let go of connections."""
        self._engine.dispose()
        self._storage.remove_session()
        self._storage.engine.dispose()

    def sync(self, trials: Iterable[Trial]) -> int:
        """Add those of the trials that are finished and that the mirror lacks; returns how many.

        Raises StoreError. Where the connection breaks nothing is raised: the next call adds them.
        """
        self._waiting |= {trial.number: trial for trial in trials if trial.state.finished}
        try:
            if self._done is None:
                self._done = self._mirrored()
            missing = [t for number, t in self._waiting.items() if number not in self._done]
            added = self._add(missing)
            self._waiting.clear()
            return added
        except (StoreUnreachable, CommitUnknown, *_OPTUNAS_OWN):
            self._done = None  # what came through is to be seen
            return 0

    def _add(self, missing: list[Trial]) -> int:
        if not missing:
            return 0
        templates = [self._template(trial) for trial in missing]
        if self._tables is None:
            for template in templates:
                self._storage.create_new_trial(self._study_id, template_trial=template)
        else:
            with transaction(self._engine, write=True) as connection:
                _insert(connection, self._tables, self._study_id, templates)
        assert self._done is not None
        self._done |= {trial.number for trial in missing}
        return len(missing)

    def _mirrored(self) -> set[int]:
        if self._tables is None:
            present = self._storage.get_all_trials(self._study_id, deepcopy=False)
            return {trial.user_attrs[KEY] for trial in present if KEY in trial.user_attrs}
        trials, attributes = self._tables["trials"], self._tables["trial_user_attributes"]
        query = (
            sa.select(attributes.c.value_json)
            .join_from(trials, attributes, attributes.c.trial_id == trials.c.trial_id)
            .where(trials.c.study_id == self._study_id, attributes.c.key == KEY)
        )
        with transaction(self._engine, write=False) as connection:
            return {json.loads(value) for value in connection.execute(query).scalars()}

    def _template(self, trial: Trial) -> FrozenTrial:
        started, ended = _times(trial)
        parameters = {} if trial.genome is None else self._parameters(trial.genome)
        template = create_trial(
            state=_STATES[trial.state],
            values=trial.values if trial.state is State.COMPLETE else None,
            params=parameters,
            distributions=self._distributions if parameters else {},
            user_attrs=_attributes(trial),
        )
        template.datetime_start, template.datetime_complete = started, ended
        return template

    def _parameters(self, genome: Genome) -> dict[str, bool | float | str]:
        """The genes shown: of a discrete one the value that it decodes to."""
        return {
            name: known[level_of(u, len(known))] if (known := self._values.get(name)) else u
            for name, u in zip(self._genes, genome, strict=False)
        }


def _open_study(
    storage: RDBStorage, name: str, directions: int, metric_names: Sequence[str]
) -> int:
    study = optuna.create_study(
        storage=storage, study_name=name, directions=["maximize"] * directions, load_if_exists=True
    )
    if "evomerge" not in study.user_attrs:
        if study.get_trials(deepcopy=False):
            raise StoreError(
                f"the database holds an Optuna study {name!r} that evomerge did not make; "
                "give your study another name, or use another --store"
            )
        study.set_user_attr("evomerge", name)
    if metric_names and study.metric_names != list(metric_names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(metric_names))
    return study._study_id


def _attributes(trial: Trial) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        KEY: trial.number,
        "kind": trial.kind,
        "label": trial.label,
        "recipe": trial.recipe_digest,
        "seconds": trial.seconds,
    }
    score = trial.scores.get("search")
    if score is not None:
        attributes |= {f"score {name}": task.value for name, task in score.tasks.items()}
    if trial.failure is not None:
        attributes["error"] = f"{trial.failure.error}: {trial.failure.message}"
    return attributes


def _times(trial: Trial) -> tuple[datetime, datetime]:
    """When the search part began and ended, on the local clock without a zone, as Optuna has it."""
    attempts = [attempt for attempt in trial.attempts if attempt.part == "search"]
    ended = [attempt.finished_at for attempt in attempts if attempt.finished_at is not None]
    started = [attempt.started_at for attempt in attempts] or [datetime.now(UTC)]
    return _local(min(started)), _local(max(ended or started))


def _local(instant: datetime) -> datetime:
    return instant.astimezone().replace(tzinfo=None)


def _utc(local: datetime | None) -> datetime | None:
    return None if local is None else local.astimezone(UTC).replace(tzinfo=None)


def _insert(
    connection: sa.Connection,
    tables: Mapping[str, sa.Table],
    study_id: int,
    templates: Sequence[FrozenTrial],
) -> None:
    """Write trials as Optuna's `create_new_trial` does, many at once."""
    studies, trials = tables["studies"], tables["trials"]
    # Optuna locks the study's row too, so that no number is given twice
    connection.execute(
        sa.select(studies.c.study_id).where(studies.c.study_id == study_id).with_for_update()
    )
    count = sa.select(sa.func.count()).select_from(trials).where(trials.c.study_id == study_id)
    first = connection.execute(count).scalar_one()
    ids = connection.execute(
        sa.insert(trials).returning(trials.c.trial_id, sort_by_parameter_order=True),
        [
            {
                "study_id": study_id,
                "number": first + place,
                "state": template.state.name,
                "datetime_start": _utc(template.datetime_start),
                "datetime_complete": _utc(template.datetime_complete),
            }
            for place, template in enumerate(templates)
        ],
    ).scalars()
    numbered = list(zip(ids, templates, strict=True))
    for name, rows in {
        "trial_values": [row for key, t in numbered for row in _value_rows(key, t)],
        "trial_params": [row for key, t in numbered for row in _parameter_rows(key, t)],
        "trial_user_attributes": [row for key, t in numbered for row in _attribute_rows(key, t)],
    }.items():
        if rows:
            connection.execute(sa.insert(tables[name]), rows)


def _value_rows(key: int, template: FrozenTrial) -> list[dict[str, Any]]:
    kinds = {float("inf"): "INF_POS", float("-inf"): "INF_NEG"}
    return [
        {
            "trial_id": key,
            "objective": objective,
            "value": None if value in kinds else value,
            "value_type": kinds.get(value, "FINITE"),
        }
        for objective, value in enumerate(template.values or ())
    ]


def _parameter_rows(key: int, template: FrozenTrial) -> list[dict[str, Any]]:
    return [
        {
            "trial_id": key,
            "param_name": name,
            "param_value": template.distributions[name].to_internal_repr(value),
            "distribution_json": _distribution_json(template.distributions[name]),
        }
        for name, value in template.params.items()
    ]


@functools.cache
def _distribution_json(distribution: BaseDistribution) -> str:
    return distribution_to_json(distribution)


def _attribute_rows(key: int, template: FrozenTrial) -> list[dict[str, Any]]:
    return [
        {"trial_id": key, "key": name, "value_json": json.dumps(value)}
        for name, value in template.user_attrs.items()
    ]
