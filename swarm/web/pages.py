"""The pages of an HTTP face: files of this package. What a browser may do with them is said by `swarm.web.headers`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from starlette.applications import Starlette
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

STATIC: Final = Path(str(files("swarm.web") / "static"))
FRESH: Final = {"Cache-Control": "no-cache"}
"""Asked for again each time, and mostly answered with 304: what belongs together is of one version."""


class _Assets(StaticFiles):
    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(FRESH)
        return response


def add_page(app: Starlette, name: str) -> None:
    """Serve the page `name`, a folder of `static`, at `/`, and everybody's files at `/assets`."""

    async def index(_: object) -> Response:
        return FileResponse(STATIC / name / "index.html", headers=FRESH)

    app.router.routes.append(Route("/", index, methods=["GET"], include_in_schema=False))
    app.router.routes.append(Mount("/assets", _Assets(directory=STATIC), name="assets"))
