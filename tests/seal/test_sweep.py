"""Every causal language model in Transformers against the table in the documentation."""

from __future__ import annotations

import pytest
from sweep import TABLE, architectures, row


def test_the_table_has_every_architecture_and_no_failure():
    table = TABLE.read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:] == architectures()
    assert "FAILED" not in table


@pytest.mark.slow
@pytest.mark.parametrize("model_type", architectures())
def test_every_architecture_does_what_the_table_says(model_type):
    assert row(model_type) in TABLE.read_text().splitlines()
