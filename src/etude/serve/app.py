"""What the page answers, by address.  Everything is a GET; nothing that a browser sends changes anything."""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from etude.papers import rooms, trending
from etude.serve import views
from etude.serve.library import Library
from etude.study.store import Store
from etude.values.errors import InputError

HOSTS = ("127.0.0.1", "localhost")
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
"""A report is a page of its own, with its style inside, and no script at all."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
STATIC = Path(__file__).with_name("static")
TYPES = {"style.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}


def create_app(store: Store) -> FastAPI:
    """The page over a store."""
    app = FastAPI(title="Étude", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))
    library = Library(store)
    app.state.library = library

    @app.middleware("http")
    async def guarded(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await answer(request)
        response.headers.setdefault("Content-Security-Policy", POLICY)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.exception_handler(InputError)
    def mistaken(request: Request, error: InputError) -> Response:
        return _page("error.html.jinja", 404, status=404, title=error.message, remedy=error.remedy or "")

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> Response:
        return _page("error.html.jinja", error.status_code, status=error.status_code, title="There is no such page" if error.status_code == 404 else str(error.detail), remedy="")

    @app.exception_handler(RequestValidationError)
    def misread(request: Request, error: RequestValidationError) -> Response:
        return _page("error.html.jinja", 400, status=400, title="This address cannot be read", remedy="; ".join(f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()))

    _add_papers(app, library)
    _add_methods(app)
    _add_studies(app, store)
    _add_store(app, store)

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in TYPES:
            raise HTTPException(404)
        return FileResponse(STATIC / name, media_type=TYPES[name])

    return app


def _add_papers(app: FastAPI, library: Library) -> None:
    @app.get("/")
    def home() -> Response:
        return RedirectResponse("/papers")

    @app.get("/papers")
    def papers(
        q: Annotated[str, Query(max_length=400)] = "", stage: str = "", status: str = "", verdict: str = "", year: str = "", page: Annotated[int, Query(ge=1, le=100_000)] = 1,
        fragment: bool = False,
    ) -> Response:  # fmt: skip
        found = views.papers(library, q.strip(), {"stage": stage, "status": status, "verdict": verdict, "year": year}, page)
        return _page("results.html.jinja" if fragment else "papers.html.jinja", **found)

    @app.get("/papers.json")
    def papers_data(q: Annotated[str, Query(max_length=400)] = "", stage: str = "", status: str = "", verdict: str = "", year: str = "") -> Response:
        return JSONResponse(views.chosen(library, q.strip(), {"stage": stage, "status": status, "verdict": verdict, "year": year}))

    @app.get("/papers/{slug:path}")
    def paper(slug: str) -> Response:
        return _page("paper.html.jinja", **views.paper(library, slug))

    @app.get("/trending")
    def hot(since: str = "") -> Response:
        days = trending.span(since) if since else None
        return _page("trending.html.jinja", rows=trending.trending(library.papers().values(), views.today(), days, 100), since=since)


def _add_methods(app: FastAPI) -> None:
    @app.get("/methods")
    def methods() -> Response:
        return _page("methods.html.jinja", stages=rooms.stages(), **views.others())

    @app.get("/methods/{name}")
    def stage_or_method(name: str) -> Response:
        if name in rooms.stages():
            return _page("stage.html.jinja", stage=name, stages=rooms.stages(), rows=rooms.stage_rows(name))
        return _page("method.html.jinja", **views.method(name))


def _add_studies(app: FastAPI, store: Store) -> None:
    @app.get("/studies")
    def studies(fragment: bool = False) -> Response:
        return _page("runs.html.jinja" if fragment else "studies.html.jinja", **views.studies(store))

    @app.get("/studies/{name}")
    def study(name: str, fragment: bool = False) -> Response:
        return _page("live.html.jinja" if fragment else "study.html.jinja", **views.study(store, name))

    @app.get("/studies/{name}/report")
    def report(name: str) -> Response:
        return HTMLResponse(views.report(store, name), headers={"Content-Security-Policy": REPORT_POLICY})

    @app.get("/studies/{name}/results.json")
    def results(name: str) -> Response:
        return FileResponse(views.results(store, name), media_type="application/json")


def _add_store(app: FastAPI, store: Store) -> None:
    @app.get("/store")
    def objects(page: Annotated[int, Query(ge=1, le=100_000)] = 1) -> Response:
        return _page("store.html.jinja", **views.objects(store, page))

    @app.get("/store/{key}")
    def one(key: str) -> Response:
        record = views.record(store, key)
        return _page("record.html.jinja", key=key, record=record, text=json.dumps(record, indent=1, ensure_ascii=False))


def _page(template: str, code: int = 200, /, **values: Any) -> HTMLResponse:
    return HTMLResponse(_templates().get_template(template).render(values), code)


@functools.cache
def _templates() -> Environment:
    environment = Environment(loader=PackageLoader("etude.serve", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": views.number, "interval": views.interval, "duration": views.duration, "bytes": views.size, "when": views.when}
    environment.globals |= {"address": _address}
    return environment


def _address(filters: Mapping[str, Any], **more: Any) -> str:
    """The part of an address after its question mark, ready for another parameter."""
    return "".join(f"{urlencode({key: value})}&" for key, value in {**filters, **more}.items() if value not in ("", None))
