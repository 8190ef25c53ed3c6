"""The results file."""

import json
import pathlib
import subprocess

HERE = pathlib.Path(__file__).resolve().parent
NAMES = ("op", "section", "case")  # what names a row


def commit_of(options):
    if options.commit:
        return options.commit
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40",
               "--exclude=*"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


class Results:
    """A results file with one row a line, written whole after every row.

    Each row says its op, section and case, and the commit and the JAX that it was measured with. It
    replaces the older row of the same name; all others stay. So several ops share a file, and a run
    that was stopped goes on. A file of another device is not gone on with.
    """

    def __init__(self, path, device, commit, jax_version):
        self.path, self.stamp = path, {"commit": commit, "jax": jax_version}
        self.data = {"device": device, "ceilings": {}, "errors": [], "rows": []}
        old = read(path) if path is not None and path.exists() else {}
        if old.get("device") == device:
            self.data |= old | {"errors": []}

    @property
    def rows(self):
        return self.data["rows"]

    @property
    def errors(self):
        return self.data["errors"]

    def find(self, op, section, case):
        """The row of that name, or None."""
        same = (row for row in self.rows if tuple(row[n] for n in NAMES) == (op, section, case))
        return next(same, None)

    def has(self, op, section, case):
        """Whether it was measured at this very commit, with this JAX."""
        row = self.find(op, section, case)
        known = not self.stamp["commit"].endswith(("-dirty", "unknown"))
        return known and row is not None and all(row[k] == v for k, v in self.stamp.items())

    def add(self, op, section, case, row):
        row = {"op": op, "section": section, "case": case} | row | self.stamp
        old = self.find(op, section, case)
        if old:
            self.rows[self.rows.index(old)] = row
        else:
            self.rows.append(row)
        self.save()

    def save(self):
        if self.path is None:
            return
        head = {key: value for key, value in self.data.items() if key != "rows"}
        rows = ",\n".join(f"  {json.dumps(row)}" for row in self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
        temporary.replace(self.path)
