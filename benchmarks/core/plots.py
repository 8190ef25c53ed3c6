"""Plots as small SVG files: dots of ratios, and panels of lines."""

import math

TIMES = "\u00d7"
FONT = 'font-family="Helvetica, Arial, sans-serif"'
INK, GREY, GRID = "#24292f", "#57606a", "#d8dee4"


class Svg:
    """A drawing of a size, to which elements are added."""

    def __init__(self, width, height):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" {FONT} font-size="13" fill="{INK}">',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
        ]

    def add(self, tag, text=None, **attributes):
        names = " ".join(
            f'{name.replace("_", "-")}="{value:g}"' if isinstance(value, int | float)
            else f'{name.replace("_", "-")}="{value}"'
            for name, value in attributes.items()
        )  # fmt: skip
        self.parts.append(f"<{tag} {names}" + ("/>" if text is None else f">{text}</{tag}>"))

    def line(self, x1, y1, x2, y2, stroke=GRID, **attributes):
        x1, y1, x2, y2 = (round(value, 1) for value in (x1, y1, x2, y2))
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, **attributes)

    def text(self, x, y, text, anchor="start", **attributes):
        self.add("text", text, x=round(x, 1), y=round(y, 1), text_anchor=anchor, **attributes)

    def dot(self, x, y, color, filled=True):
        fill = color if filled else "#fff"
        self.add("circle", cx=round(x, 1), cy=round(y, 1), r=4, fill=fill, stroke=color,
                 stroke_width=1.6)  # fmt: skip

    def write(self, path):
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


# Light to dark with the number of heads.
HEAD_COLORS = {8: "#c6dbef", 16: "#9ecae1", 32: "#4292c6", 64: "#08519c", 128: "#081d58"}


def draw_ratios(path, title, rows, label, peer, labels):
    """The ratios of a decode's rows: a line of dots for each batch x length, a dot for each case.

    Args:
      path: of the file.
      title: over the plot.
      rows: result rows, each with a ratio.
      label: of a row, the name of its line.
      peer: whose time is over ours.
      labels: what the lines' names are.
    """
    lines = {}
    shape = "batch", "d_k", "topk", "extra_topk", "mean_len", "varlen", "h_q"
    for row in sorted(rows, key=lambda row: [row.get(name, 0) for name in shape]):
        dot = row["ratio"], HEAD_COLORS[row["h_q"]], row["s_q"] == 1
        lines.setdefault(label(row).replace("x", TIMES), []).append(dot)
    heads = sorted({row["h_q"] for row in rows})
    legend = [(f"{number} heads", HEAD_COLORS[number], True) for number in heads]
    if any(row["s_q"] > 1 for row in rows):
        legend.append(("hollow: 2 queries a sequence", GREY, False))
    left, right, top, step = 162, 780, 84, 24
    bottom = top + step * len(lines)
    first = min(0.9, math.floor(10 * min(row["ratio"] for row in rows)) / 10)
    last = math.ceil(10 * max(row["ratio"] for row in rows) + 1) / 10
    svg = Svg(800, bottom + 56)

    def x(ratio):
        return left + (right - left) * (ratio - first) / (last - first)

    svg.text(16, 28, title, font_size=17, font_weight="bold")
    svg.text(left - 14, 56.5, labels.replace("x", TIMES), "end", fill=GREY)
    place = left + 8
    for text, color, filled in legend:
        svg.dot(place, 52, color, filled)
        svg.text(place + 9, 56.5, text)
        place += 30 + 7 * len(text)
    svg.add("rect", x=left, y=top - 8, width=round(x(1) - left, 1), height=bottom - top + 8,
            fill="#f6f8fa")  # fmt: skip
    for tenth in range(math.ceil(10 * first / 2) * 2, math.floor(10 * last) + 1, 2):
        svg.line(x(tenth / 10), top - 8, x(tenth / 10), bottom)
        svg.text(x(tenth / 10), bottom + 18, f"{tenth / 10:.1f}", "middle", fill=GREY)
    svg.line(x(1), top - 8, x(1), bottom, INK, stroke_width=1.5)
    axis = f"{peer}'s time / ours: right of 1.0 we are faster"
    svg.text((left + right) / 2, bottom + 42, axis, "middle", fill=GREY)
    for i, (name, dots) in enumerate(lines.items()):
        y = top + step * (i + 0.5) - 4
        svg.text(left - 14, y + 4.5, name, "end")
        svg.line(left, y, right, y, stroke_dasharray="1 3")
        for ratio, color, filled in dots:
            svg.dot(x(ratio), y, color, filled)
    svg.write(path)


def draw_panels(path, panels, colors, columns=3):
    """Shares of the floor in panels: a line for each series over a logarithmic axis.

    Args:
      path: of the file.
      panels: {title: (name of the axis, {series: [(x, share)]})}.
      colors: {series: colour}.
      columns: panels side by side.
    """
    width, height, left, top = 310, 220, 48, 62
    lines = -(-len(panels) // columns)
    svg = Svg(columns * width + 10, lines * height + 30)
    svg.text(16, 24.5, "share of the floor:", fill=GREY)
    for i, (series, color) in enumerate(colors.items()):
        svg.dot(150 + 130 * i, 20, color)
        svg.text(160 + 130 * i, 24.5, series)
    for i, (title, (axis, lines)) in enumerate(panels.items()):
        panel(svg, i % columns * width + left, i // columns * height + top, title, axis, lines,
              colors)  # fmt: skip
    svg.write(path)


def panel(svg, left, top, title, axis, lines, colors, width=248, height=130):
    logs = [math.log2(x) for points in lines.values() for x, _ in points]
    low, high = min(logs), max(logs)
    svg.text(left, top - 8, title, font_weight="bold")

    def place(log, share):
        x = left + width * (0.03 + 0.94 * (log - low) / ((high - low) or 1))
        return x, top + height * (1 - share / 1.05)

    for share in (0, 0.25, 0.5, 0.75, 1):
        _, y = place(low, share)
        svg.line(left, y, left + width, y, INK if share == 0 else GRID)
        svg.text(left - 6, y + 4, f"{share:.0%}", "end", fill=GREY, font_size=11)
    step = max(1, math.ceil((high - low) / 4))
    for log in range(round(low), round(high) + 1, step):
        name = f"{2**log}" if log < 13 else f"{2 ** (log - 10)}k" if log < 20 else "1M"
        svg.text(place(log, 0)[0], top + height + 15, name, "middle", fill=GREY, font_size=11)
    svg.text(left + width / 2, top + height + 31, axis, "middle", fill=GREY, font_size=11)
    for series, points in lines.items():
        places = [place(math.log2(x), share) for x, share in sorted(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        svg.add("polyline", points=path, fill="none", stroke=colors[series], stroke_width=1.6)
        for x, y in places:
            svg.add("circle", cx=round(x, 1), cy=round(y, 1), r=2.6, fill=colors[series])
