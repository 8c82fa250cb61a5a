#!/usr/bin/env python3
"""Print each hunk of `diff main-orig.py main-wds.py` under its title in README.md.

python tests/lesson.py
"""

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def hunks():
    """[(lines of main-orig.py, the lines of main-wds.py that replace them)], in the order of the files."""
    orig = (ROOT / "main-orig.py").read_text().splitlines()
    wds = (ROOT / "main-wds.py").read_text().splitlines()
    blocks = difflib.SequenceMatcher(None, orig, wds, autojunk=False).get_opcodes()
    return [(orig[a:b], wds[c:d]) for what, a, b, c, d in blocks if what != "equal"]


def titles():
    """The numbers and bold titles of README.md's list of the hunks, such as "4. The loaders are wrapped."."""
    readme = (ROOT / "README.md").read_text()
    _, _, section = readme.partition("\n### What main-wds.py changes\n")
    section, *_ = re.split(r"^#{1,3} ", section, flags=re.M)  # up to the next heading
    items = re.findall(r"^(\d+\.)\s+\*\*(.+?)\*\*", section, flags=re.M | re.S)
    return [f"{number} {' '.join(title.split())}" for number, title in items]


if __name__ == "__main__":
    for title, (old, new) in zip(titles(), hunks(), strict=True):
        print(f"\n{'=' * 20} {title} (-{len(old)} +{len(new)} lines)\n")
        for line in old:
            print(f"< {line}")
        if old and new:
            print("---")
        for line in new:
            print(f"> {line}")
