"""How often a compiled program launches: XLA dumps its plan of the program, which is counted."""

import pathlib
import re
import tempfile


def compile_and_count(lowered, trips, options):
    """(the compiled program, (graphs, single commands) that it launches or None if unknown)."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={**options, "xla_dump_to": folder})
        # Where the passes over it change nothing, only the first of these is there.
        names = ["*.thunk_sequence.txt", "*.thunk_sequence_after_thunk_passes.txt"]
        files = [file for name in names for file in pathlib.Path(folder).glob(name)]
        return compiled, count_launches(files[-1].read_text(), trips) if files else None


def count_launches(thunks, trips):
    """(graphs, single commands) that a list of thunks launches, its loops running `trips` times.

    A line is a thunk, indented by what it is part of. The condition of a loop whose trip count is
    known is not evaluated.
    """
    graphs = singles = 0
    weight, inside = 1, None
    for line in thunks.splitlines():
        thunk = re.match(r"( *)\d+: (k\w+)", line)
        if thunk is None:
            weight = {"condition:": 0, "body:": trips}.get(line.strip(), weight)
            continue
        indent, kind = len(thunk[1]), thunk[2]
        if indent == 0:
            weight = 1
        if inside is not None and indent > inside:
            continue
        inside = indent if kind == "kCommandBuffer" else None
        if kind == "kCommandBuffer":
            graphs += weight
        elif kind != "kWhile":
            singles += weight
    return graphs, singles
