"""How rows are named and grouped, and Markdown tables."""


def name_of(row):
    return f"{row['batch']} x {row['mean_len']}" + (" varlen" if row["varlen"] else "")


def grouped(rows):
    """Rows by what heads a table: (dtype, page_block_size, s_q, h_q)."""
    groups = {}
    for row in rows:
        key = (row["dtype"], row["page_block_size"], row["s_q"], row["h_q"])
        groups.setdefault(key, []).append(row)
    return dict(sorted(groups.items()))


def title_of(key):
    dtype, page, s_q, h_q = key
    return f"s_q {s_q}, h_q {h_q}, {dtype}, page {page}"


def number(value, digits):
    return "" if value is None else f"{value:.{digits}f}"


def markdown(head, lines):
    """A table of lines of cells."""
    head_lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(head_lines + ["| " + " | ".join(cells) + " |" for cells in lines])
