"""Asking an OpenAI-compatible endpoint, such as vLLM's server."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

from data_gen.console import first_line

KEY = "OPENAI_API_KEY"  # of the environment; an endpoint of one's own needs none
LARGEST_ANSWER = 200_000  # bytes


def ask(
    url: str, path: str, body: dict[str, Any] | None, read: Callable[[Any], Any], *, key: str | None = None,
    timeout: float = 120, tries: int = 5, pause: float = 1.0,
) -> Any:  # fmt: skip
    """One answer; what may pass (time-outs, 429, 5xx, what is no answer) is tried again.

    Args:
        url: the endpoint's address, such as ``http://localhost:8000/v1``.
        path: below the address, such as ``completions``.
        body: sent as JSON; None asks without sending.
        read: takes what is wanted out of the answer's JSON; a KeyError, IndexError, TypeError or ValueError of its says
            that it is not there.
        key: sent along; no message ever holds it.
        timeout: seconds to wait for an answer.
        tries: how often to ask.
        pause: seconds before the second try; doubled for each that follows.

    Raises:
        ValueError: no answer after ``tries``, or the endpoint refuses.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    problem = ""
    for trial in range(tries):
        if trial:
            time.sleep(pause * 2 ** (trial - 1))
        try:
            method = "GET" if body is None else "POST"
            answer = httpx.request(method, f"{url.rstrip('/')}/{path}", json=body, headers=headers, timeout=timeout)
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
            continue
        except httpx.InvalidURL as error:
            raise ValueError(f"base-url: found {url!r}, which is no address ({first_line(error)})") from None
        if answer.status_code == 429 or answer.status_code >= 500:
            problem = f"status {answer.status_code}"
            continue
        if answer.status_code != 200:
            hint = f": is {KEY} right?" if answer.status_code in (401, 403) else ""
            raise ValueError(f"{url} refuses with status {answer.status_code}{hint}")
        try:
            if len(answer.content) > LARGEST_ANSWER:
                raise ValueError("longer than an answer can be")
            return read(answer.json())
        except (ValueError, KeyError, IndexError, TypeError) as error:
            problem = f"no {path.replace('/', ' ').rstrip('s')} in its answer ({type(error).__name__})"
    raise ValueError(f"{url} gave no usable answer in {tries} {'try' if tries == 1 else 'tries'}; the last: {problem}")


def text_of(found: Any) -> str:
    """What should be text.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(found, str):
        raise TypeError("not text")
    return found
