"""Random JSON schemas whose answers are bounded."""

from __future__ import annotations

import random
from typing import Any

WORDS = ("hive", "bee", "queen", "wax", "comb", "drone", "né", 'a "quote"', "back\\slash")


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """An object of one to four required fields, nested `depth` deep at most."""
    names = rng.sample(WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    flat, nested = ("string", "integer", "boolean", "null", "enum", "const"), ("array", "object", "anyOf")
    kind = rng.choice(flat + nested if depth else flat)
    low = rng.randint(-99, 99)
    match kind:
        case "string":
            return {"type": "string", "maxLength": rng.randint(0, 12)}
        case "integer":
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 999)}
        case "enum":
            return {"enum": rng.sample((*WORDS, 1, 2.5, None, True), rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(WORDS)}
        case "array":
            return {"type": "array", "items": _value(rng, depth - 1), "maxItems": rng.randint(0, 3)}
        case "object":
            return random_schema(rng, depth - 1)
        case "anyOf":
            return {"anyOf": [_value(rng, depth - 1), _value(rng, depth - 1)]}
        case _:
            return {"type": kind}
