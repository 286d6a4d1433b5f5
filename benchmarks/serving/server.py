"""Questions to a running server."""

import json
import urllib.request
from typing import Any, Final

SERVED_NAME: Final = "benchmark"


def complete(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answer of /v1/completions to a request."""
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        result: dict[str, Any] = json.load(answer)
    return result


def model_name(address: str) -> str:
    """The first model that a server names."""
    with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as answer:
        name: str = json.load(answer)["data"][0]["id"]
    return name
