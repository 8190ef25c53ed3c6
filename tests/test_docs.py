"""The snippets of the documentation."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_snippets_of_the_docs():
    text = (ROOT / "docs/transforms.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 6
    exec("\n".join(snippets), {})
