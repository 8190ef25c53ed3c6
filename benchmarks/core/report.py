"""Tables of the pages in docs/, and the gate."""

import functools
import math
import re
import statistics
import textwrap

from core import plots

GATE = 1.0  # never slower than the peer

SUSTAINED = """
Cases that reach the card's power limit, run for 0.15 s without a rest, after a warm-up. The card
draws as much power as it may, and the SM clock falls. The clock is measured on the device right
after. The power is NVML's."""

PLAIN = """
Plain JAX: a jitted function that gathers the tokens and has two einsums, which sum in float32, and
a softmax between them. The reference is the op with `implementation="xla"`, whose temporary memory
is bounded."""


def mean(ratios):
    ratios = list(ratios)
    return statistics.geometric_mean(ratios) if ratios else math.nan


def summary(rows):
    """One sentence on the ratios; nothing where there is no peer."""
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    if not ratios:
        return ""
    return (
        f"Over {len(ratios)} cases the ratio's geometric mean is {mean(ratios):.2f}, its least "
        f"{min(ratios):.2f}."
    )


def markdown(rows, columns):
    """A table of rows.

    columns: (title, key of the row or function of it, format); a key that is absent or None is an
    empty cell.
    """

    def cell(row, key, form):
        value = key(row) if callable(key) else row.get(key)
        return "" if value is None else format(value, form)

    cells = [[title, *(cell(row, *column) for row in rows)] for title, *column in columns]
    cells = [each for each in cells if any(each[1:])]  # a column that is empty is left out
    head, *lines = ["| " + " | ".join(line) + " |" for line in zip(*cells, strict=True)]
    return "\n".join([head, "|" + "---|" * len(cells), *lines])


def wrapped(text):
    """Paragraphs in lines of a page's width."""
    fill = functools.partial(textwrap.fill, width=100, break_on_hyphens=False)
    return "\n\n".join(fill(" ".join(part.split())) for part in text.strip().split("\n\n"))


class Page:
    """The page of a card, which grows by sections; `commit` is that of most of its rows."""

    def __init__(self, card, text, commit):
        self.card, self.commit = card, commit
        self.parts = [f"# Performance on one {card}"]
        self.add(wrapped(text))

    def add(self, *parts):
        self.parts += [part for part in parts if part]

    def section(self, title, text, rows, columns, level=3):
        """A section with a table; nothing where there are no rows."""
        if not rows:
            return
        commits = sorted({row["commit"] for row in rows})
        if commits != [self.commit]:
            text += f" Measured at commit {', '.join(f'`{commit}`' for commit in commits)}."
        self.add(f"{'#' * level} {title}", wrapped(text), markdown(rows, columns))

    def __str__(self):
        return "\n\n".join(self.parts) + "\n"


def of(rows, op, section):
    """The rows of one section, in the order of the file."""
    return [row for row in rows if (row["op"], row["section"]) == (op, section)]


def op_tables(page, op, rows, text=""):
    """The tables of all cases of an op: by heading, in the order of its cases."""
    order = {case.name: i for i, case in enumerate(op.cases)}
    rows = sorted(of(rows, op.name, "table"), key=lambda row: order.get(row["case"], len(order)))
    groups = {}
    for row in rows:
        groups.setdefault(op.heading(row), []).append(row)
    for heading, group in groups.items():
        ways = dict.fromkeys(re.findall(r"peer_(?!sustained)(\w+)_us", " ".join(map(str, group))))
        page.section(heading, text, group, [
            (op.labels, op.label, ""), ("us", "us", ".1f"), ("share", "of_floor", ".0%"),
            ("floor", "floor_us", ".1f"), ("+ schedule", "us_with_schedule", ".1f"),
            *((column.replace("_us", " us"), column, ".1f") for column in op.beside),
            ("peer us", "peer_us", ".1f"),
            *((f"{way} us", f"peer_{way}_us", ".1f") for way in ways),
            ("ratio", "ratio", ".2f"), ("rel. error", "rel_err", ".1e"),
        ])  # fmt: skip

    def long_name(row):
        return f"{op.label(row)}, {op.heading(row)}"

    page.section(
        "Under sustained load",
        SUSTAINED,
        [row for row in rows if row.get("sustained_us")],
        [
            ("case", long_name, ""), ("us in bursts", "us", ".1f"), ("us", "sustained_us", ".1f"),
            ("MHz", "sustained_mhz", ""), ("W", "sustained_watts", ""),
            ("peer us", "peer_sustained_us", ".1f"), ("MHz", "peer_sustained_mhz", ""),
            ("W", "peer_sustained_watts", ""),
        ],
    )  # fmt: skip
    page.section(
        "Beside plain JAX",
        PLAIN,
        [row for row in rows if row.get("plain_us")],
        [
            ("case", long_name, ""), ("us", "us", ".1f"), ("plain JAX us", "plain_us", ".0f"),
            ("times", lambda row: row["plain_us"] / row["us"], ".1f"),
            ("reference us", "jax_us", ".0f"),
        ],
    )  # fmt: skip
    page.section(
        "Beside the reference",
        'The same op with `implementation="xla"`, in JAX ops.',
        [row for row in rows if row.get("jax_us") and not row.get("plain_us")],
        [
            ("case", long_name, ""), ("us", "us", ".1f"), ("reference us", "jax_us", ".0f"),
            ("times", lambda row: row["jax_us"] / row["us"], ".1f"),
        ],
    )  # fmt: skip


def decode_section(page, op, title, about, rows, plot):
    """The section of a decode: what it is, its ratios as a picture in `plot`, its tables."""
    found = of(rows, op.name, "table")
    if not found:
        return
    names = ", ".join(sorted({row["peer"].split(", ")[0] for row in found if row["peer"]}))
    page.add(f"## {title}", wrapped(about.format(peer=names or "absent")), summary(found))
    if names:
        peer, compared = names.split(" (")[0], [row for row in found if row["ratio"]]
        heading = f"{title} beside {peer}, one {page.card}"
        plots.draw_ratios(plot, heading, compared, op.label, peer, op.labels)
        page.add(f"![time of {peer} over ours, by case]({plot.name})")
    op_tables(page, op, rows)


def gate_failures(op, results):
    """What keeps the results of an op from passing the gate, one line each."""
    rows = of(results["rows"], op.name, "table")
    failures = [f"error: {text}" for text in results["errors"]]
    measured = {row["case"] for row in rows}
    failures += [f"{case.name}: missing" for case in op.cases if case.name not in measured]
    if len(commits := sorted({row["commit"] for row in rows})) > 1:
        failures.append(f"the cases are of several commits: {', '.join(commits)}")
    for row in results["rows"]:
        if row["op"] == op.name and (wrong := op.wrong(row)):
            failures.append(f"{row['section']} {row['case']}: {wrong}")
    for row in rows:
        if row["ratio"] is None:
            failures.append(f"{row['case']}: no peer")
        elif not row["ratio"] >= GATE:
            failures.append(
                f"{row['case']}: ratio {row['ratio']:.3f} < {GATE} ({row['us']} us, peer "
                f"{row['peer_us']}, floor {row['floor_us']})"
            )
    return failures
