"""The pages' files: what others wrote is as they published it, and what we wrote loads nothing from elsewhere."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from swarm.web.headers import OwnPagesOnly
from swarm.web.pages import STATIC, add_page

VENDORED = json.loads((STATIC / "vendor" / "vendored.json").read_text())
OURS = [path for path in STATIC.rglob("*.*") if path.suffix in (".html", ".js", ".css") and "vendor" not in path.parts]


@pytest.mark.parametrize("package", VENDORED, ids=lambda package: package["name"])
def test_what_others_wrote_is_as_they_published_it(package: dict[str, object]) -> None:
    folder = STATIC / "vendor" / str(package["name"])
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert found == package["files"]
    assert "LICENSE" in found


def test_our_files_name_no_other_host() -> None:
    for path in OURS:
        assert not re.search(r"//[a-z0-9-]+\.[a-z]", path.read_text()), path


@pytest.mark.parametrize("page", ["chat", "dashboard"])
def test_a_page_may_run_nothing_but_our_files(page: str) -> None:
    app = Starlette()
    add_page(app, page)
    app.add_middleware(OwnPagesOnly)
    client = TestClient(app)
    answer = client.get("/")
    assert "script-src 'self';" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert "<script>" not in answer.text
    assets = re.findall(r'"(assets/[^"]+)"', answer.text)
    assert len(assets) > 4
    for asset in assets:
        sent = client.get(f"/{asset}")
        assert sent.content == (STATIC / Path(asset).relative_to("assets")).read_bytes()
        assert sent.headers["cache-control"] == "no-cache"
        assert client.get(f"/{asset}", headers={"if-none-match": sent.headers["etag"]}).status_code == 304
    assert client.get("/assets/../pages.py").status_code == 404
