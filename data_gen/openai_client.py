"""Query an OpenAI-compatible endpoint, such as vLLM's server."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

from axolotl_plugins.common.console import first_line

KEY = "OPENAI_API_KEY"  # environment variable; local endpoints need none
LARGEST_RESPONSE = 200_000  # bytes


def ask(
    url: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], Any], *, key: str | None = None,
    timeout: float = 120, tries: int = 5, pause: float = 1.0,
) -> Any:  # fmt: skip
    """Send a request; retry transient failures (time-outs, 429, 5xx, malformed responses).

    Args:
        url: base URL of the endpoint, such as ``http://localhost:8000/v1``.
        path: relative to the base URL, such as ``completions``.
        body: posted as JSON; None sends a GET request.
        read: extracts the result from the response's JSON; KeyError, IndexError, TypeError and ValueError mark the
            response as malformed.
        key: bearer token; never part of an error message.
        timeout: seconds to wait for a response.
        tries: number of attempts.
        pause: seconds before the second attempt; doubled before each later one.

    Raises:
        ValueError: ``tries`` attempts failed, or the endpoint rejects the request.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    problem = ""
    for trial in range(tries):
        if trial:
            time.sleep(pause * 2 ** (trial - 1))
        try:
            method = "GET" if body is None else "POST"
            response = httpx.request(method, f"{url.rstrip('/')}/{path}", json=body, headers=headers, timeout=timeout)
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            continue
        except httpx.InvalidURL as error:
            raise ValueError(f"base-url: found {url!r}, expected a URL ({first_line(error)})") from None
        if response.status_code == 429 or response.status_code >= 500:
            problem = f"status {response.status_code}"
            continue
        if response.status_code != 200:
            hint = f": is {KEY} right?" if response.status_code in (401, 403) else ""
            raise ValueError(f"{url} refuses with status {response.status_code}{hint}")
        try:
            if len(response.content) > LARGEST_RESPONSE:
                raise ValueError("longer than a valid response")
            return read(response.json())
        except (ValueError, KeyError, IndexError, TypeError) as error:
            problem = f"no {path.replace('/', ' ').rstrip('s')} in its answer ({type(error).__name__})"
    raise ValueError(f"{url} gave no usable answer in {tries} {'try' if tries == 1 else 'tries'}; the last: {problem}")


def text_of(value: Any) -> str:
    """Return a value; raise TypeError unless it is text."""
    if not isinstance(value, str):
        raise TypeError("not text")
    return value
