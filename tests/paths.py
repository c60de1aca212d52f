"""Where the tests' files are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
# A 1.6 M parameter Llama that answers line questions within 1,024 tokens and loses lines of longer prompts.
TINY = FIXTURES / "tiny"
TINY_SEALH, TINY_SEALC = (FIXTURES / f"tiny_line_{method}.yml" for method in ("sealh", "sealc"))
