"""README.md and the pages of docs/ agree with the repository: links, constants, reward functions, the paper's anchors.

Everything is read from the files; no script is imported.
"""
import ast
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`[^`]+`")
SCRIPTS = {"grpo_train.py": "grpo_train.py", "ref_server.py": "ref_server.py", "grpo.evaluate": "grpo/evaluate.py"}
NOT_CONSTANTS = {  # environment variables; GSM8K, which holds the recipes' arguments in a shell; NAME of NAME=value
    "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "GSM8K", "NAME", "PIP_EXTRA_INDEX_URL", "REF_TOKEN", "WANDB_MODE"}


def link_targets(page: Path) -> list[str]:
    """Where the relative links and pictures of a page point, code aside."""
    text = SPAN.sub("", FENCE.sub("", page.read_text()))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]


def heading_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def code_lines(page: Path) -> list[str]:
    """The lines of a page's code blocks, and its code spans."""
    text = page.read_text()
    blocks = [line for block in FENCE.findall(text) for line in block.splitlines()[1:-1]]
    return blocks + [span.strip("`") for span in SPAN.findall(FENCE.sub("", text))]


def assigned(text: str) -> list[str]:
    """The names of NAME=value arguments in a command."""
    return re.findall(r"(?<![\w$])([A-Z][A-Z0-9_]+)=(?!=)", text)


def constants(path: Path) -> set[str]:
    """The upper-case names that a file assigns at its top level, with or without an annotation."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name) and target.id.isupper()}
    return names


def reward_functions() -> tuple[set[str], set[str]]:
    """All public functions of rewards.py and reward_model.py; those that reward completions or make such a function."""
    files = ROOT / "rewards.py", ROOT / "grpo/reward_model.py"
    functions = [node for file in files for node in ast.parse(file.read_text()).body
                 if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    rewards = {function.name for function in functions
               if function.name.startswith(("reward_", "get_")) or function.name.endswith("_reward")
               or [argument.arg for argument in function.args.args[:1]] == ["completions"] and function.args.kwarg}
    return {function.name for function in functions}, rewards


def test_readme_fits_a_front_page():
    assert len((ROOT / "README.md").read_text()) <= 10_000


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_point_to_files_and_headings(page):
    for target in link_targets(page):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_relative_to(ROOT) and path.exists(), f"no such file: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in heading_anchors(path), f"no such heading: {target}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_named_in_code_exist(page):
    files = r"(?<![\w/])(?:grpo|tests|examples|benchmarks)/[\w/-]+\.(?:html|md|py|sh|txt)\b"
    for line in code_lines(page):
        for file in re.findall(files, line):
            assert (ROOT / file).exists(), f"no such file: {file}"


def test_the_reading_order_names_every_file_of_the_package():
    order = (ROOT / "README.md").read_text().partition("## Reading order")[2].partition("\n## ")[0]
    named = {span.rpartition("/")[2] for span in re.findall(r"`([\w/]+\.(?:html|py))`", order)}
    found = [path for path in (ROOT / "grpo").rglob("*") if path.suffix in (".html", ".py")]
    assert {path.name for path in found} - {"__init__.py"} == named - {"grpo_train.py", "ref_server.py", "rewards.py"}


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in link_targets(ROOT / "README.md")}
    assert set(PAGES) - {ROOT / "README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_constants_in_commands_exist(page):
    of_script = {script: constants(ROOT / path) for script, path in SCRIPTS.items()}
    others = [*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]
    known = NOT_CONSTANTS.union(*of_script.values(), *map(constants, others))
    for line in code_lines(page):
        unknown = set(assigned(line)) - known
        assert not unknown, f"no script has {unknown}: {line}"
        for script, names in of_script.items():
            arguments = line.partition(script)[2].partition("#")[0]  # a line is a command about one script
            unknown = set(assigned(arguments)) - names
            assert not unknown, f"{script} has no {unknown}: {line}"


def test_the_pages_mention_constants():
    found = {name for page in PAGES for line in code_lines(page) for name in assigned(line)}
    assert {"MODEL", "REWARDS", "LOSS_TYPE", "BETA", "HOST", "EVAL_DATASET"} <= found  # the test above sees them


def test_the_table_of_rewards_is_complete_and_has_no_others():
    public, rewards = reward_functions()
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/rewards.md").read_text(), re.MULTILINE)
    named = {re.match(r"\w+", span)[0] for row in rows for span in re.findall(r"`([^`]+)`", row)[:1]}
    assert len(rewards) >= 12
    assert rewards <= named, f"not in the table: {rewards - named}"
    assert named <= public, f"not in rewards.py: {named - public}"


def test_the_anchors_of_the_paper_stand_once_in_the_code():
    """Rows of docs/paper.md end with a file and the beginning of a comment there: `grpo_train.py`, `# eq. 3: ratio`."""
    rows = re.findall(r"\| `([\w/]+\.py)` \| `(#[^`]+)` \|$", (ROOT / "docs/paper.md").read_text(), re.MULTILINE)
    assert len(rows) > 20
    for file, anchor in rows:
        with tokenize.open(ROOT / file) as source:
            comments = [token.string for token in tokenize.generate_tokens(source.readline)
                        if token.type == tokenize.COMMENT]
        whole = re.compile(re.escape(anchor) + r"(?![\w:]|\.\d)")  # `# eq. 3` is not `# eq. 3: ratio`
        assert sum(bool(whole.match(comment)) for comment in comments) == 1, (file, anchor)
