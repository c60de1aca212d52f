"""Needles from an endpoint: a real HTTP server that answers well, badly, late and not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data_gen.needles import PROMPT, collect, parse
from data_gen.tasks import niah

NEEDLE = "The {} thing you hear on opening the drawer is the clatter of seven brass keys on a ring."
QUESTION = "What is the {} thing you hear on opening the drawer?"


def pairs(*numbers: int) -> str:
    return "\n".join(json.dumps({"needle": NEEDLE.format(n), "question": QUESTION.format(n)}) for n in numbers)


@pytest.fixture
def server():
    """Gives each request the next of ``answers``: text of a completion, a status, raw bytes, or seconds to wait."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            httpd.seen.append((self.path, body, self.headers.get("Authorization")))
            answer = httpd.answers.pop(0) if len(httpd.answers) > 1 else httpd.answers[0]
            status, payload = 200, b""
            if isinstance(answer, float):
                time.sleep(answer)
            elif isinstance(answer, int):
                status = answer
            elif isinstance(answer, bytes):
                payload = answer
            else:
                payload = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(payload)
            except OSError:
                pass  # the client timed out, as it should

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.seen, httpd.answers = [], []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()


def ask(server, count, **options):
    return collect(count, server.url, "m", "sk-secret", **{"timeout": 2.0, "tries": 3, "pause": 0.01, **options})


def test_collects_different_needles_with_the_papers_prompt(server):
    server.answers = [pairs(1, 2), pairs(2, 2, 3), pairs(4, 5)]
    needles = ask(server, 4)
    assert [pair["needle"] for pair in needles] == [NEEDLE.format(n) for n in (1, 2, 3, 4)]
    path, body, key = server.seen[0]
    assert (path, body["model"], key) == ("/v1/chat/completions", "m", "Bearer sk-secret") and len(server.seen) == 3
    assert body["messages"] == [{"role": "user", "content": PROMPT}]
    assert PROMPT.startswith("I am trying to test the retrieval") and PROMPT.endswith("10 sets of examples for me?")


@pytest.mark.parametrize(
    "bad", [503, 429, b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', 1.0]
)
def test_transient_failures_are_retried(server, bad):
    server.answers = [bad, pairs(1)]
    assert len(ask(server, 1, timeout=0.3)) == 1 and len(server.seen) == 2


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([503], "gave no usable answer in 3 tries; the last: status 503"),
        ([1.0], "in 3 tries; the last: ReadTimeout"),
        ([b"x" * 300_000], "no chat completion in its answer"),
        ([401], r"refuses with status 401: is OPENAI_API_KEY right\?"),
        (["I cannot do that."], "3 answers in a row held no new needle; 0 of 2 found"),
        ([pairs(1)], "held no new needle; 1 of 2 found"),
    ],
)
def test_failure_is_one_line_without_the_key(server, answers, message):
    server.answers = answers
    with pytest.raises(ValueError, match=message) as error:
        ask(server, 2, timeout=0.3)
    assert "sk-secret" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        '"needle": "Too short.", "question": "What?"',
        pairs(1).replace("?", "."),
        pairs(1).replace(".", ""),
        pairs(1)[:-20],
        json.dumps(niah.TEST_NEEDLE),
        json.dumps({**niah.TEST_NEEDLE, "needle": "On Sundays " + niah.TEST_NEEDLE["needle"].upper()}),
        "",
    ],
)
def test_invalid_pairs_are_dropped(text):
    assert parse(text) == []


def test_pairs_are_found_in_prose_code_blocks_and_without_braces():
    bare = f'1. "needle": "{NEEDLE.format(1)}", "question": "{QUESTION.format(1)}"'
    assert len(parse(f"Here you are:\n```json\n{pairs(2)}\n```\n{bare}\nAnything else?")) == 2


def test_command_writes_needles_that_niah_takes(server, tmp_path):
    server.answers = [pairs(1, 2, 3)]
    command = [sys.executable, "-m", "data_gen", "needles", "--base-url", server.url, "--model", "m"]
    options = {"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 60}
    done = subprocess.run([*command, "--samples", "3", "--out", "n.jsonl"], **options, env={**os.environ, "OPENAI_API_KEY": "sk-secret"})  # fmt: skip  # noqa: E501
    assert done.returncode == 0, done.stderr
    assert len(niah.needles(tmp_path / "n.jsonl")) == 3 and "sk-secret" not in done.stdout + done.stderr
    assert server.seen[0][2] == "Bearer sk-secret"
    server.answers = [401]
    failed = subprocess.run([*command, "--out", "x.jsonl"], **options)
    assert failed.returncode == 1 and failed.stderr.count("seal: ") == 1 and not (tmp_path / "x.jsonl").exists()
