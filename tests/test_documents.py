"""What the README and the docs say is true as far as a machine can tell."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def _blocks() -> list:
    found = []
    for page in PAGES:
        blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        found += [pytest.param(b, id=f"{page.name}-{i}") for i, b in enumerate(blocks)]
    return found


@pytest.mark.parametrize("block", _blocks())
def test_python_examples_run(block, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(ROOT / "results")
    for number, name in enumerate(re.findall(r'"(\w+\.jpg)"', block)):
        Image.new("RGB", (90, 90), (10 * number, 100, 100)).save(name)
    shorter = re.sub(r"\brange\(\d+\)", "range(3)", block)  # of trainings: what they print is said
    exec(compile(shorter, "example", "exec"), {})
    assert re.search(r"95% interval|^\['\w+' '\w+'\] \[\[", capsys.readouterr().out)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in link:
            continue
        target, _, heading = link.partition("#")
        there = page.parent / target if target else page
        assert there.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert heading in [_anchor(each) for each in headings], link


def _anchor(heading: str) -> str:
    """Return what GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_ci_runs_the_readme_s_test_command():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in (".venv/bin/python -m pytest -n auto", '-c constraints.txt -e ".[dev]"'):
        assert command in readme
        assert command in ci


def test_every_public_name_is_documented_and_exported():
    import fewstep

    for name in fewstep.__all__:
        thing = getattr(fewstep, name)
        assert thing.__doc__, name
        assert not thing.__doc__.startswith(f"{name}("), f"{name} has a dataclass's own docstring"


def test_the_readme_s_comparison_of_methods_is_that_of_the_tables():
    text = " ".join((ROOT / "README.md").read_text().split())
    compared = text[text.index("For the same few tasks") :]
    of_ablation, of_others = (
        json.loads((ROOT / "results" / name / "table.json").read_text())["rows"]
        for name in ("maml++-ablation-reduced", "methods-20w1s-reduced")
    )
    rows = {name: of_ablation[name] for name in ("MAML", "MAML++")} | of_others
    for name, row in rows.items():
        found = re.search(rf"[:,] {re.escape(name)}(?: by one step)? ([\d.]+) ± ([\d.]+)", compared)
        assert found is not None, name
        assert found[1] == f"{100 * row['single']['mean']:.1f}", name
        if name in of_others:  # the interval of the others is the one at its widest
            assert found[2] == f"{100 * row['single']['ci95']:.1f}", name


def test_results_are_json():
    for file in (ROOT / "results").rglob("*.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)
