"""The plots of docs/performance.md."""

import math

import goals
import workloads
from tables import grouped, name_of, title_of

OURS, PEER, STORED = "#1f5fbf", "#c05a1a", "#808080"


def pyplot():
    """matplotlib set so that the same figures give the same file, with its text as text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "performance", "svg.fonttype": "none"})
    return plt


def save(figure, path):
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    pyplot().close(figure)


def draw_cases(rows, path, stored):
    """Share of the floor by case: ours, the peer of the run, the best stored peer if `stored`."""
    plt = pyplot()
    groups = grouped(rows)
    columns = min(4, len(groups))
    lines = math.ceil(len(groups) / columns)
    size = (3.6 * columns + 1.6, 3.2 * lines + 0.8)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharey=False, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (key, group) in zip(axes.flat, groups.items(), strict=False):
        draw_panel(axis, key, group, stored)
    save(figure, path)


def shares(rows, times):
    """Percent of the floor; NaN where there is no time."""
    return [
        100 * row["floor_us"] / us if us else math.nan for row, us in zip(rows, times, strict=True)
    ]


def series_of(rows, stored):
    """(label, percent of the floor, marker, colour) of ours and the peers."""
    series = [
        ("jax_flashmla", shares(rows, [row["us"] for row in rows]), "o", OURS),
        ("FlashMLA, same run", shares(rows, [row["peer_us"] for row in rows]), "x", PEER),
    ]
    if stored:
        best = [goals.best_stored_us(workloads.case_of(row)) for row in rows]
        series.append(("best peer, stored figure", shares(rows, best), "|", STORED))
    return series


def draw_panel(axis, key, rows, stored):
    places = range(len(rows))
    for label, values, marker, color in series_of(rows, stored):
        size = 11 if marker == "|" else 6
        axis.plot(values, places, marker, color=color, label=label, markersize=size)
    axis.set_yticks(places, [name_of(row) for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 105)
    axis.set_xlabel("% of the floor", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_title(title_of(key), fontsize=9)


def growth_panels(rows):
    """{title: (name of the x axis, rows)}: by batch at one length, by length at each batch."""
    panels = {}
    for heads in sorted({row["h_q"] for row in rows}):
        ours = [row for row in rows if row["h_q"] == heads and not row["varlen"]]
        length = workloads.GROWTH_LENGTH
        panels[f"h_q {heads}, length {length}"] = (
            "batch", [row for row in ours if row["mean_len"] == length]
        )  # fmt: skip
        for batch in workloads.GROWTH_LENGTH_BATCHES:
            series = [
                row
                for row in ours
                if row["batch"] == batch and row["mean_len"] in workloads.GROWTH_LENGTHS
            ]
            panels[f"h_q {heads}, batch {batch}"] = ("mean_len", series)
    return {title: panel for title, panel in panels.items() if panel[1]}


def draw_growth(rows, path, stored):
    """Share of the floor by batch and by length."""
    plt, panels = pyplot(), growth_panels(rows)
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns + 1, 2.8 * lines + 0.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, (name, group)) in zip(axes.flat, panels.items(), strict=False):
        group = sorted(group, key=lambda row: row[name])
        places = [row[name] for row in group]
        for label, values, marker, color in series_of(group, stored):
            style, size = ("_", 14) if marker == "|" else (f"{marker}-", 6)
            axis.plot(places, values, style, color=color, label=label, markersize=size)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 105)
        axis.set_xlabel("batch" if name == "batch" else "length", fontsize=8)
        axis.set_ylabel("% of the floor", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(color="#e0e0e0", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_title(title, fontsize=9)
    save(figure, path)
