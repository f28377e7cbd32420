"""Requests made from the API's own description, sense and nonsense: none may be the server's fault."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode

from tests.helpers.gateway import GatewayWorld, serving

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
"""Requests of each kind and path with a body; more on request."""
MAX_TOKENS = 4


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    world = GatewayWorld(tmp_path_factory.mktemp("gateway"))
    with serving(world.served) as gateway:
        yield gateway.url
        assert httpx2.get(f"{gateway.url}/health", timeout=60).json()["status"] == "ok"
    world.close()


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_is_the_servers_fault(url: str, mode: GenerationMode) -> None:
    """`mode`: requests that the description allows, or not."""
    statuses = set[int]()
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        body = operation.method == "post"

        @settings(
            max_examples=EXAMPLES if body else 2,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
            derandomize=True,
            database=None,
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Case) -> None:
            aim(case)
            response = case.call(timeout=60)
            statuses.add(response.status_code)
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        try:
            ask()
        except Unsatisfiable:  # nothing about this one can be wrong
            assert not body
    assert 400 in statuses
    assert mode.is_negative or 200 in statuses


def aim(case: Case) -> None:
    """At the model that is there, and with an early end."""
    if not isinstance(case.body, dict):
        return
    if isinstance(case.body.get("model"), str):
        case.body["model"] = "talker"
    limits = [name for name in ("max_tokens", "max_completion_tokens") if name in case.body]
    for name in limits or ["max_tokens"]:
        limit = case.body.get(name)
        if limit is None or isinstance(limit, int):  # none: as far as the context goes
            case.body[name] = MAX_TOKENS if limit is None else min(limit, MAX_TOKENS)
