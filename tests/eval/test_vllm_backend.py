"""Served models: the answers of the same weights loaded locally, from the same token ids."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from paths import TINY

from axolotl_plugins.seal.model_loading import load
from eval.benchmarks import run_benchmark
from eval.score_by_length import score_by_length
from eval.vllm_backend import connect


@pytest.fixture(scope="module")
def loaded():
    return load(TINY)


@pytest.fixture(scope="module")
def server(loaded):
    """An OpenAI-compatible endpoint with the small model behind it, as vLLM's is for prompts of token ids."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body):
            payload = json.dumps(body).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(payload)

        def do_GET(self):
            self.reply({"data": [{"id": loaded.name}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            httpd.seen.append((self.path, body))
            prompt = torch.tensor([body["prompt"]])
            with lock:
                output = loaded.model.generate(prompt, max_new_tokens=body["max_tokens"], do_sample=False)
            text = loaded.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
            self.reply({"choices": [{"index": 0, "text": text}]})

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.seen = []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/v1"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()


def test_a_served_model_answers_as_it_does_locally(loaded, server):
    served = connect(load(TINY, weights=False), server.url)
    assert all(parameter.is_meta for parameter in served.model.parameters())
    options = {"lengths": [260], "samples": 3}
    local = score_by_length(loaded, "line", **options)
    assert score_by_length(served, "line", batch_size=2, **options) == replace(
        local, dtype=None
    )  # the server knows its dtype
    path, body = server.seen[0]
    assert path == "/v1/completions" and len(server.seen) == 3
    assert (body["model"], body["temperature"], body["max_tokens"]) == (str(TINY), 0, 100)
    assert body["prompt"].count(loaded.tokenizer.bos_token_id) == 1


def test_models_that_cannot_be_served_are_refused(loaded, server, tmp_path):
    with pytest.raises(ValueError, match=rf"serves {TINY}, not other: start it with `vllm serve other`"):
        connect(type(loaded)(**{**vars(loaded), "name": "other"}), server.url)
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9/v1 gave no usable answer .* ConnectError"):
        connect(loaded, "http://127.0.0.1:9/v1")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter: `make merge ADAPTER="):
        connect(type(loaded)(**{**vars(loaded), "name": str(tmp_path)}), server.url)
    with pytest.raises(ValueError, match="mmlu compares probabilities"):
        run_benchmark(connect(loaded, server.url), "mmlu")
