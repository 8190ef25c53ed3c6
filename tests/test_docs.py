"""The README and the pages of docs/: snippets run, links lead somewhere, pages stay short."""

import re
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla as mla

ROOT = Path(__file__).parent.parent
PAGES = [
    page.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "findings/*.md")
    for page in sorted(ROOT.glob(pattern))
]
DOCS = [page for page in PAGES if page.startswith("docs/")]


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page):
    return re.findall(r"```python\n(.*?)```", read(page), re.DOTALL)


def without_code(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def links(page):
    """(the file that a link leads to, its anchor or "") of each link to a file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(page))):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield ((ROOT / page).parent / path).resolve() if path else (ROOT / page), anchor


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ +(.*)$", without_code(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return found


# Snippets.


def expected_attention(q, rows):
    """Output and lse [h_q, ...] in float64 of queries [h_q, d_k] that see all rows [n, d_k]."""
    scores = np.asarray(q, np.float64) @ rows.T * rows.shape[1] ** -0.5
    largest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / total @ rows[:, :512], (np.log(total) + largest)[:, 0]


def check_decode(out, lse, q, k_cache, block_table, lengths):
    cache = np.asarray(k_cache, np.float64)
    for i, length in enumerate(np.asarray(lengths)):
        rows = cache[np.asarray(block_table)[i]].reshape(-1, 576)[:length]
        expected_out, expected_lse = expected_attention(q[i, 0], rows)
        np.testing.assert_allclose(np.asarray(out[i, 0], np.float64), expected_out, atol=2e-2)
        np.testing.assert_allclose(lse[i, :, 0], expected_lse, rtol=1e-4)


def test_the_snippet_of_the_readme_runs_as_it_stands(implementation, capsys):
    """It prints what the comment on its last line says, and its results are right.

    It names no implementation: on a machine with a Hopper GPU it must run the kernels by itself.
    """
    (code,) = snippets("README.md")
    names = {}
    exec(code, names)
    printed = code.rstrip().splitlines()[-1].partition("  # ")[2]
    assert printed
    assert capsys.readouterr().out.strip() == printed
    for i, length in enumerate(np.asarray(names["lengths"])):
        page = names["block_table"][i, (length - 1) // names["page_size"]]
        row = names["k_cache"][page, (length - 1) % names["page_size"], 0]
        np.testing.assert_array_equal(row, names["new_kv"][i])
    inputs = [names[key] for key in ("q", "k_cache", "block_table", "lengths")]
    check_decode(names["out"], names["lse"], *inputs)
    if implementation == "cuda":
        program = names["step"].lower(names["q"], names["new_kv"], *inputs[1:]).as_text()
        for op in ("append_kv", "tile_scheduler", "dense_decode"):
            assert f"jax_flashmla_{op}" in program


def test_the_step_of_the_readme_takes_any_pages():
    """Pages in any order, a row that ends early; nothing but the new tokens is written."""
    names = {}
    exec(snippets("README.md")[0], names)
    rng = np.random.default_rng(0)
    lengths = np.array([1, 64, 100], np.int32)
    table = np.array([[4, -1], [2, -1], [0, 3]], np.int32)
    cache = jnp.asarray(rng.standard_normal((5, 64, 1, 576)), jnp.bfloat16)
    q = jnp.asarray(rng.standard_normal((3, 1, names["heads"], 576)), jnp.bfloat16)
    new = jnp.asarray(rng.standard_normal((3, 576)), jnp.bfloat16)
    expected_cache = np.array(cache, np.float32)
    for i, length in enumerate(lengths):
        expected_cache[table[i, (length - 1) // 64], (length - 1) % 64, 0] = new[i]
    out, lse, cache = names["step"](q, new, cache, table, lengths)
    np.testing.assert_array_equal(np.asarray(cache, np.float32), expected_cache)
    check_decode(out, lse, q, expected_cache, table, lengths)


# The snippets of each page; those of a page run one after the other, in one namespace.
RUN_HERE = {
    "docs/append.md": 1,
    "docs/schedule.md": 1,
    "docs/sparse_attention.md": 3,
    "docs/transforms.md": 6,
}
# Beside other tests, which check what the snippets compute.
RUN_ELSEWHERE = ["docs/models.md", "docs/parallelism.md"]


def given(page):
    """The names that the snippets of a page take from the reader's program."""
    if page != "docs/append.md":
        return {}
    return {
        "jax": jax,
        "mla": mla,
        "step": lambda k_cache: k_cache,
        "k_cache": jnp.zeros((2, 16, 1, 576), jnp.bfloat16),
        "new_kv": jnp.ones((1, 576), jnp.bfloat16),
        "slots": jnp.array([17], jnp.int32),
    }


def check_two_caches(names):
    """Each query sees the last 128 tokens of its sequence and the compressed ones it picked."""
    out, lse = names["attend_to_both"](names["q"], None)
    pool, compressed = (np.asarray(names[k], np.float64) for k in ("k_window", "k_compressed"))
    for i, length in enumerate(np.asarray(names["lengths"])):
        tokens = pool[np.asarray(names["block_table"])[i]].reshape(-1, 512)[:length][-128:]
        rows = np.concatenate([tokens, compressed[i, np.asarray(names["picked"])[i], 0]])
        expected_out, expected_lse = expected_attention(names["q"][i, 0], rows)
        np.testing.assert_allclose(np.asarray(out[i, 0], np.float64), expected_out, atol=2e-2)
        np.testing.assert_allclose(lse[i, :, 0], expected_lse, rtol=1e-4)


@pytest.mark.parametrize(("page", "count"), RUN_HERE.items())
def test_snippets_of_the_docs_run(page, count):
    assert len(snippets(page)) == count
    names = given(page)
    exec("\n".join(snippets(page)), names)
    if page == "docs/append.md":
        written = np.argwhere(np.asarray(names["k_cache"], np.float32)[:, :, 0, 0])
        assert written.tolist() == [[1, 1]]
    if page == "docs/sparse_attention.md":
        check_two_caches(names)


def test_no_page_has_snippets_that_nothing_runs():
    assert {page for page in DOCS if snippets(page)} == {*RUN_HERE, *RUN_ELSEWHERE}
    others = [path for path in ROOT.glob("tests/*.py") if path != Path(__file__)]
    for page in RUN_ELSEWHERE:
        assert any(f'"{page}"' in path.read_text(encoding="utf-8") for path in others)


# Links.


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    wrong = []
    for path, anchor in links(page):
        if not path.exists():
            wrong.append(f"no file {path}")
        elif anchor and anchor not in anchors(path.read_text(encoding="utf-8")):
            wrong.append(f"no heading {path}#{anchor}")
    assert wrong == []


@pytest.mark.parametrize("folder", ["jax_flashmla", "cuda", "benchmarks", "examples"])
def test_pages_that_the_code_names_exist(folder):
    files = [
        p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cu", ".cuh", ".h", ".cc"}
    ]
    named = {
        (path.relative_to(ROOT).as_posix(), page)
        for path in files
        for page in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert files
    assert [(path, page) for path, page in sorted(named) if not (ROOT / page).exists()] == []


def test_anchors_are_those_of_github():
    text = "# A call\n## What's `it` worth?\n```\n# no heading\n```\n## h_q · s_q, 1\n# A call\n"
    assert anchors(text) == ["a-call", "whats-it-worth", "h_q--s_q-1", "a-call-1"]


def test_every_page_and_figure_can_be_reached_from_the_readme():
    reached, left = set(), [ROOT / "README.md"]
    while left:
        path = left.pop()
        if path in reached:
            continue
        reached.add(path)
        if path.suffix == ".md" and path.exists():
            left += [target for target, _ in links(path.relative_to(ROOT).as_posix())]
    pages = {path for pattern in ("**/*.md", "*.svg") for path in (ROOT / "docs").glob(pattern)}
    assert pages - reached == set()


@pytest.mark.parametrize("figure", sorted(path.name for path in ROOT.glob("docs/*.svg")))
def test_figures_are_svg(figure):
    root = ElementTree.parse(ROOT / "docs" / figure).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"


# Length and contents.


def test_pages_stay_short():
    assert len(read("README.md").splitlines()) <= 180
    assert 100 <= len(read("docs/dense_decode.md").splitlines()) <= 150
    assert 150 <= len(read("docs/sparse_attention.md").splitlines()) <= 220
    assert len(snippets("README.md")[0].splitlines()) <= 30


def test_public_names_stand_in_the_readme():
    named = set(re.findall(r"`(\w+)`", read("README.md")))
    assert set(mla.__all__) - {"__version__"} <= named


def test_the_glossary_has_every_word():
    text = read("docs/concepts.md").lower()
    defined = set(re.findall(r"^\*\*([a-z ]+)\.?\*\*|^\| (\w+) \||^### (\w+)", text, re.MULTILINE))
    defined = {word for groups in defined for word in groups}
    words = "sequence, query row, row tile, tile, page, slot, part, split, piece, schedule, join, "
    words += "combine, merge, reference, floor, list, extra cache, sink, token mask"
    assert set(words.split(", ")) <= defined
