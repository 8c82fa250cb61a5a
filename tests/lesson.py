#!/usr/bin/env python3
"""The lesson: each hunk of `diff main-orig.py main-wds.py`, under the words that README.md has for it.

python tests/lesson.py
"""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def hunks():
    """[(lines of main-orig.py, lines of main-wds.py that take their place)], in the files' order."""
    orig, wds = ((ROOT / name).read_text().splitlines() for name in ("main-orig.py", "main-wds.py"))
    blocks = difflib.SequenceMatcher(None, orig, wds, autojunk=False).get_opcodes()
    return [(orig[a:b], wds[c:d]) for what, a, b, c, d in blocks if what != "equal"]


def words():
    """The README's sentence on each hunk, which stands there in bold and with its number."""
    return re.findall(r"^\*\*(\d+\. [^*]+)\*\*", (ROOT / "README.md").read_text(), re.M)


if __name__ == "__main__":
    for title, (old, new) in zip(words(), hunks(), strict=True):
        count = f"-{len(old)} +{len(new)} lines"
        print(f"\n{'=' * 20} {' '.join(title.split())} ({count})\n")
        print(*(f"< {line}" for line in old), *["---"] * bool(old and new), *(f"> {line}" for line in new), sep="\n")
