"""The door to completion servers."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from etude.engine.cost import spend
from etude.values.errors import InputError
from etude.values.generator import Endpoint, Policy

TIMEOUT = 300.0
"""Seconds to wait for a server's answer."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def ask(endpoint: Endpoint, policy: Policy, prompt: str, seed: int) -> str:
    """What the server says after the prompt.  Raises InputError if it does not answer as it should."""
    address = endpoint.url.rstrip("/") + "/completions"
    body: dict[str, Any] = {
        "model": endpoint.model, "prompt": prompt, "max_tokens": policy.max_new_tokens, "temperature": policy.temperature, "top_p": policy.top_p, "seed": seed,
    }  # fmt: skip
    if policy.stop:
        body["stop"] = list(policy.stop)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {})
    answer = _post(address, json.dumps(body).encode(), headers)
    try:
        data = json.loads(answer)
        text = data["choices"][0]["text"]
        spend(tokens=int((data.get("usage") or {}).get("total_tokens", 0)))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{address} answered with no completion: {answer[:200].decode(errors='replace')}", remedy="Is it an OpenAI-compatible server?") from error
    return str(text)


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it would carry the key to another host."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def _post(address: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Send and receive.  Raises InputError if the server cannot be reached, is too slow, or refuses."""
    if urlsplit(address).scheme not in ("http", "https"):
        raise InputError(f"an endpoint's url begins with http:// or https://, got {address}")
    handlers: list[urllib.request.BaseHandler] = [_Stay()]
    if urlsplit(address).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address, body, headers, method="POST")
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace").strip()
        remedy = "Set the key's environment variable." if error.code in (401, 403) else None
        raise InputError(f"{address} answered {error.code} {error.reason}: {said}", remedy=remedy) from error
    except TimeoutError as error:
        raise InputError(f"{address} did not answer within {TIMEOUT:g} seconds") from error
    except (OSError, http.client.HTTPException) as error:  # urllib.error.URLError is an OSError
        reason = getattr(error, "reason", error)
        slow = isinstance(reason, TimeoutError)
        raise InputError(f"{address} did not answer within {TIMEOUT:g} seconds" if slow else f"{address} cannot be reached: {reason}", remedy="Is the server running?") from error
