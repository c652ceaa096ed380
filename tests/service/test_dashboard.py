"""The dashboard on a mirrored study: it answers with our trials, and to nobody who would write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest

from evomerge.errors import StoreError, UserError
from evomerge.service.dashboard import WsgiApp, dashboard_app, serve_dashboard
from evomerge.store import open_store
from evomerge.store.mirror import OptunaMirror
from evomerge.testing.store_builders import StudyUnderTest


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> WsgiApp:
    url = f"sqlite:///{tmp_path_factory.mktemp('dashboard')}/store.db"
    study = StudyUnderTest(open_store(url), "zoo-ties")
    study.start()
    study.finish(values=(0.75,))
    mirror = OptunaMirror(url, "zoo-ties", directions=1, gene_names=["scale.a", "scale.b"])
    mirror.sync(study.store.trials("zoo-ties"))
    mirror.close()
    study.store.close()
    return dashboard_app(url)


def request(app: WsgiApp, method: str, path: str) -> tuple[int, bytes]:
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "PATH_INFO": path}
    setup_testing_defaults(environ)
    status: list[int] = []

    def start_response(line: str, headers: object, exc_info: object = None) -> None:
        status.append(int(line.split()[0]))

    body = b"".join(app(environ, start_response))
    return status[-1], body


def test_the_study_is_listed_with_its_trials(app: WsgiApp) -> None:
    status, body = request(app, "GET", "/api/studies")
    (summary,) = json.loads(body)["study_summaries"]
    assert (status, summary["study_name"]) == (200, "zoo-ties")
    status, body = request(app, "GET", f"/api/studies/{summary['study_id']}")
    (trial,) = json.loads(body)["trials"]
    assert (status, trial["state"], trial["values"]) == (200, "Complete", [0.75])
    attributes = {entry["key"]: entry["value"] for entry in trial["user_attrs"]}
    assert attributes["evomerge_number"] == "0"
    assert [parameter["name"] for parameter in trial["params"]] == ["scale.a", "scale.b"]


@pytest.mark.parametrize("path", ["/dashboard", "/static/bundle.js"])
def test_pages_are_served_without_the_network(app: WsgiApp, path: str) -> None:
    status, body = request(app, "GET", path)
    assert status == 200
    assert body


@pytest.mark.parametrize("method", ["DELETE", "POST", "PUT", "PATCH", "delete", "OPTIONS"])
def test_nothing_can_be_changed(app: WsgiApp, method: str) -> None:
    assert request(app, method, "/api/studies/1")[0] == 403
    assert request(app, "GET", "/api/studies/1")[0] == 200


def test_a_store_that_is_not_there_is_not_created(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store"):
        dashboard_app(f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna_dashboard", None)
    with pytest.raises(UserError, match=r"evomerge\[dashboard\]"):
        serve_dashboard("memory://")
