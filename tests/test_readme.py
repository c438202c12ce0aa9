"""The README's table of constants is complete and true."""
import inspect
import re

from conftest import ROOT

import grpo_train
import ref_server
import rewards


def test_every_constant_is_in_the_table_with_its_default():
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| `?([^|`]+)`? \|", text, re.MULTILINE))
    for name, value in vars(grpo_train).items():
        if not name.isupper() or name in ("DS_CONFIG", "REWARDS", "SYSTEM_PROMPT", "CLIP_LOW", "CLIP_HIGH"):
            continue
        assert type(value)(rows[name].strip() != "False" and rows[name].strip()) == value, name
    for name in vars(ref_server):
        assert not name.isupper() or f"`{name}`" in text, name


def test_every_reward_function_is_in_the_table():
    text = (ROOT / "README.md").read_text()
    for name, function in vars(rewards).items():
        public = name.startswith(("reward_", "get_")) or name.endswith("_reward")
        assert not (public and inspect.isfunction(function)) or f"\n| `{name}" in text, name


def test_every_line_that_the_paper_is_mapped_to_exists():
    rows = re.findall(r"\| `([a-z_/]+\.py)` \| `(.+)` \|$", (ROOT / "docs/paper.md").read_text(), re.MULTILINE)
    assert len(rows) > 25
    for file, line in rows:
        assert line in (ROOT / file).read_text(), (file, line)
