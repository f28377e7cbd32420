"""The pages of an HTTP face: files of this package, and what a browser may do with them.

Owns where the files lie and the headers they are sent with. A page loads nothing from elsewhere and runs no script but
these files, whatever a model or a stranger writes into it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

STATIC = Path(str(files("swarm.web") / "static"))
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked again each time, and answered with 304: an update shows at once
}


class _Assets(StaticFiles):
    def file_response(self, *arguments: object, **options: object) -> Response:
        response = super().file_response(*arguments, **options)  # type: ignore[arg-type]
        response.headers.update(HEADERS)
        return response


def add_page(app: Starlette, name: str) -> None:
    """Serve the page `name` (a folder of `static`) at `/` and everybody's files at `/assets`."""
    page = STATIC / name / "index.html"

    async def index(_: object) -> Response:
        return FileResponse(page, headers=HEADERS)

    app.router.routes.append(Route("/", index, methods=["GET"], include_in_schema=False))
    app.router.routes.append(Mount("/assets", _Assets(directory=STATIC), name="assets"))
