"""Score a merged model that vLLM serves: the same token ids, answered over its OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from tqdm import tqdm

from axolotl_plugins.seal.model_loading import LoadedModel, is_adapter
from data_gen.openai_client import KEY, ask, text_of
from eval.generation import stop_ids
from eval.lm_eval_model import Harness

ANSWER_TIMEOUT = 600  # seconds
CONCURRENT_REQUESTS = 16  # the server batches them itself


@dataclass(frozen=True)
class Served(LoadedModel):
    """A model whose weights are on a server.

    Attributes:
        server: URL of its endpoint, such as ``http://localhost:8000/v1``.
    """

    server: str = ""

    @property
    def dtype(self) -> None:
        """Return None: the server knows."""


def connect(loaded: LoadedModel, server: str) -> Served:
    """Return a model, loaded without weights, as a server answers for it at the URL of an OpenAI-compatible endpoint.

    Raises:
        ValueError: the model is an adapter, the server does not respond, or it serves another model.
    """
    if is_adapter(loaded.name):
        raise ValueError(
            f"backend: vLLM serves merged models, and {loaded.name} is an adapter: "
            f"`make merge ADAPTER={loaded.name}` first"
        )
    read = lambda body: [row["id"] for row in body["data"]]  # noqa: E731
    try:
        names = ask(server, "models", None, read, key=os.environ.get(KEY), tries=1)
    except ValueError as error:
        raise ValueError(f"{error}: is it running? `vllm serve {loaded.name}` starts one") from error
    if loaded.name not in names:
        raise ValueError(
            f"{server} serves {', '.join(names)}, not {loaded.name}: start it with `vllm serve {loaded.name}`"
        )
    return Served(**vars(loaded), server=server)


class ServedHarness(Harness):
    """Sends ``prompts_together`` prompts at a time to a server."""

    loaded: Served

    def answer_all(self, requests: list[Instance], disable_tqdm: bool) -> None:
        """Answer requests into the journal as responses come in."""
        with (
            tqdm(total=len(requests), desc="prompts served", disable=disable_tqdm) as bar,
            ThreadPoolExecutor(self.prompts_together or CONCURRENT_REQUESTS) as pool,
        ):
            pending = {pool.submit(self.complete, request): request for request in requests}
            try:
                for future in as_completed(pending):
                    self.journal.add_partial("generate_until", pending[future].args, future.result())
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)

    def greedy_settings(self) -> dict[str, Any]:
        """Return sampling parameters for greedy decoding, whatever the model's generation_config.json states."""
        stop = sorted(stop_ids(self.loaded.model, self.loaded.tokenizer))
        return {"stop_token_ids": stop, "repetition_penalty": 1, "top_p": 1, "top_k": -1, "min_p": 0}

    def complete(self, request: Instance) -> str:
        """Return the greedy answer to one prompt, sent as token ids.

        Raises:
            ValueError: see ``data_gen.openai_client.ask``.
        """
        prompt, settings = request.args
        body = {
            "model": self.loaded.name, "prompt": self.tok_encode(prompt), "max_tokens": settings["max_gen_toks"],
            "temperature": 0, "stop": settings["until"] or None, **self.greedy_settings(),
        }  # fmt: skip
        read = lambda response: text_of(response["choices"][0]["text"])  # noqa: E731
        return ask(self.loaded.server, "completions", body, read, key=os.environ.get(KEY), timeout=ANSWER_TIMEOUT)
