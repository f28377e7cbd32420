"""Requests made from the JSON's own description, sense and nonsense: none may be the server's fault."""

from __future__ import annotations

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode

from tests.helpers.crowd import serving

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "5"))
"""Requests of each kind and path; more on request."""
ENDLESS = "/api/v1/stream"


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_is_the_servers_fault(mode: GenerationMode) -> None:
    """`mode`: requests that the description allows, or not."""
    statuses = set[int]()
    with serving(50) as server:
        for result in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():
            operation = result.ok()
            if operation.path == ENDLESS:
                continue

            @settings(
                max_examples=EXAMPLES,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
                derandomize=True,
                database=None,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Case) -> None:
                response = case.call(timeout=60)
                statuses.add(response.status_code)
                assert response.status_code < 500 or response.json()["error"].startswith("no route"), response.text
                if response.status_code >= 400 and response.status_code != 405:
                    assert set(response.json()) >= {"error", "hint"}

            try:
                ask()
            except Unsatisfiable:  # nothing about this one can be wrong
                continue
    assert 400 in statuses
    assert mode.is_negative or 200 in statuses
