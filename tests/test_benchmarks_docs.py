"""The README and the docs quote the figures of benchmarks/results."""

import functools
import pathlib
import re
import statistics
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import report as pages
from bench_dense_decode import OP
from core import report, results

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@functools.cache
def rows_of(name, op=OP.name, section="table"):
    return report.of(results.read(BENCHMARKS / f"results/{name}.json")["rows"], op, section)


def commit_of(name):
    (commit,) = {row["commit"] for row in rows_of(name)}
    return commit


@functools.cache
def text_of(page):
    """On one line, as a sentence may be broken anywhere."""
    return " ".join((ROOT / page).read_text().split())


def test_the_readme_quotes_the_cases():
    """Each cell of the README's table is `us (share of the floor, ratio)` of a measured row."""
    readme = (ROOT / "README.md").read_text()
    assert f"commit `{commit_of('h200')}`" in readme
    rows = {
        (r["batch"], r["mean_len"], r["varlen"], r["h_q"], r["s_q"]): r for r in rows_of("h200")
    }
    (head,) = re.findall(r"^\| batch x length \|(.*)\|$", readme, re.MULTILINE)
    columns = [re.fullmatch(r" h_q (\d+)(?:, s_q (\d+))? ", cell) for cell in head.split("|")]
    table = readme.split("| batch x length |")[1].split("\n\n")[0]
    lines = re.findall(r"^\| (\d+) x (\d+)( varlen)? \|(.*)\|$", table, re.MULTILINE)
    assert len(lines) >= 5
    for batch, length, varlen, cells in lines:
        for column, cell in zip(columns, cells.split("|"), strict=True):
            shape = int(column[1]), int(column[2] or 1)
            row = rows[int(batch), int(length), bool(varlen), *shape]
            share = f"{100 * row['of_floor']:.0f}%"
            assert cell.strip() == f"{row['us']:.1f} ({share}, {row['ratio']:.2f}x)"


def test_the_readme_quotes_the_means():
    """Of both cards; the least is that of any case."""
    quoted = re.search(
        r"geometric mean is (\S+), its least (\S+); on an H100, at commit `(\w+)`, (\S+) and (\S+)",
        text_of("README.md"),
    ).groups()
    ratios = [[row["ratio"] for row in rows_of(name)] for name in ("h200", "h100")]
    means = [f"{found(r):.2f}" for r in ratios for found in (report.mean, min)]
    assert quoted == (means[0], means[1], commit_of("h100"), means[2], means[3])


def test_the_readme_describes_its_picture():
    found = re.search(
        r"over (\d+) cases FlashMLA takes (\S+) to (\S+) times as long, geometric mean (\S+?)\]",
        text_of("README.md"),
    )
    ratios = [row["ratio"] for row in rows_of("h200")]
    figures = [f"{f(ratios):.2f}" for f in (min, max, report.mean)]
    assert found.groups() == (str(len(ratios)), *figures)


def test_the_readme_quotes_what_a_schedule_costs():
    found = re.search(
        r"its own schedule takes (\S+) us longer \(median; (\S+) us on the H100\)",
        text_of("README.md"),
    )
    medians = [
        statistics.median(row["us_with_schedule"] - row["us"] for row in rows_of(name))
        for name in ("h200", "h100")
    ]
    assert found.groups() == tuple(f"{median:.1f}" for median in medians)


def test_the_readme_quotes_the_model():
    quoted = re.search(
        r"(\d+) sequences of (\d+) tokens, a step of the whole model takes (\S+) ms; with "
        r"(the reference|plain JAX) it takes (\S+) ms",
        text_of("README.md"),
    )
    batch, context, ours, baseline, theirs = quoted.groups()
    form = {"the reference": "xla", "plain JAX": "plain"}[baseline]

    def both(name):
        rows = {row["case"]: row for row in rows_of(name, "model", "step")}
        return [f"{rows[f'{name} {batch} x {context}']['ms']:.1f}" for name in ("cuda", form)]

    assert [ours, theirs] == both("h200_model")
    assert "on an H100 [{} and {} ms]".format(*both("h100_model")) in text_of("README.md")


@pytest.mark.parametrize("card", ["h200", "h100"])
def test_the_pages_are_of_their_results(card, tmp_path):
    pages.main(["--card", card, "--docs", str(tmp_path)])
    written = list(tmp_path.iterdir())
    has_sparse = (BENCHMARKS / f"results/{card}_sparse.json").exists()
    assert len(written) == (4 if has_sparse else 3)
    for path in written:
        assert (ROOT / "docs" / path.name).read_text() == path.read_text()
        assert path.suffix != ".svg" or path.stat().st_size < 30_000


def test_the_readme_has_the_tables_of_sparse_decode(tmp_path):
    """As the report writes them, from the cards that have results."""
    (tmp_path / "docs").mkdir()
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    pages.main(["--docs", str(tmp_path / "docs")])
    assert copy.read_text() == (ROOT / "README.md").read_text()


def test_the_pages_show_figures_and_their_sections():
    for name in ("h200", "h100"):
        text = (ROOT / f"docs/performance{'' if name == 'h200' else '_' + name}.md").read_text()
        for row in rows_of(name):
            assert f"| {OP.label(row)} | {row['us']:.1f} | {row['of_floor']:.0%} |" in text
        plain = any("plain_us" in row for row in rows_of(name))
        for title in (
            "### Under sustained load", "### A step of 61 layers",
            "### Beside plain JAX" if plain else "### Beside the reference",
            "### fp16 and page sizes", "### Splits of a fixed size",
            "### Growth with batch and length", "## In a whole model", "### Reading a prompt",
            "### The attention of a prompt's chunk",
        ):  # fmt: skip
            assert f"\n{title}\n" in text


@pytest.mark.parametrize("card", ["h200", "h100"])
def test_the_stored_results_pass_the_gate(card, capsys):
    assert pages.main(["--card", card, "--gate"]) == 0
    assert "the gate is passed" in capsys.readouterr().out


def test_the_docs_quote_the_results_on_two_gpus():
    rows = rows_of("h200_x2", "parallel_decode", "two")
    text = (ROOT / "docs/parallelism.md").read_text()
    (commit,) = {row["commit"] for row in rows}
    assert f"commit `{commit}`" in text
    lines = re.findall(r"^\| (\w+) \| (\d+) x (\d+) \| (\d+) \|(.*)\|$", text, re.MULTILINE)
    assert len(lines) == len(rows)
    for (kind, batch, length, s_q, cells), row in zip(lines, rows, strict=True):
        assert (kind, int(batch), int(length), int(s_q)) == (
            row["kind"], row["batch"], row["length"], row["s_q"]
        )  # fmt: skip
        assert cells.split("|")[-1].strip() == f"{row['speedup']:.2f}x"
        times = [float(cell) for cell in cells.split("|")[:2]]
        np.testing.assert_allclose(times, [row["one_us"], row["two_us"]], atol=0.051)
