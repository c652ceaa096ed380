"""optuna-dashboard on a store: what the mirror wrote, in a browser, to look at only.

Knows nothing of evomerge's own tables. optuna-dashboard asks nobody for a password and lets any
caller delete a study, so only reading requests reach it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from evomerge.errors import UserError
from evomerge.store import open_store
from evomerge.store.mirror import open_storage

Environ = dict[str, Any]
WsgiApp = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


def dashboard_app(url: str) -> WsgiApp:
    """optuna-dashboard on the store at `url`, read-only, as a WSGI application.

    Raises UserError if optuna-dashboard is not installed, StoreError if the store cannot be used.
    """
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        raise UserError(
            "the dashboard needs optuna-dashboard; install it with "
            "`pip install 'evomerge[dashboard]'`"
        ) from None
    open_store(url, create=False).close()
    return read_only(wsgi(open_storage(url)))


def read_only(app: WsgiApp) -> WsgiApp:
    """The application, but any request that could change something is answered 403."""

    def guarded(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            start_response("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8")])
            return [b"This dashboard is read-only.\n"]
        # optuna-dashboard answers 500 for its static files to a client that sends no such header
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        return app(environ, start_response)

    return guarded


def serve_dashboard(url: str, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serve the dashboard until interrupted. Raises UserError, StoreError."""
    app = dashboard_app(url)
    try:
        server = make_server(host, port, app, server_class=_Server, handler_class=_Quiet)
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; try --port") from None
    with server:
        print(f"http://{host}:{server.server_port}/dashboard (Ctrl-C ends it)", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


class _Server(ThreadingMixIn, WSGIServer):
    """One thread for each request, so that a slow page does not block the next."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """No line on standard error for each request."""

    def log_message(self, format: str, *args: Any) -> None:
        pass
