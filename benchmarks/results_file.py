"""The results file."""

import json
import pathlib
import subprocess

import workloads

HERE = pathlib.Path(__file__).resolve().parent
SECTIONS = ("layers", "variants", "fixed", "growth")


def commit_of(options):
    if options.commit:
        return options.commit
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40",
               "--exclude=*"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def _list_of(rows):
    """A JSON list with one row a line."""
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"


class Results:
    """The results file, rewritten whole after every row.

    Beside the rows of the cases it holds those of the sections, each with its own commit; a run
    replaces what it measures and keeps the sections that it does not.
    """

    def __init__(self, path, append, device, commit):
        self.path, self.kept, self.sections = path, [], {}
        self.data = {"device": device, "commit": commit, "ceilings": {}, "rows": []}
        self.commit = commit
        old = json.loads(path.read_text()) if path is not None and path.exists() else {}
        if old.get("device") == device:
            self.sections = {name: old[name] for name in SECTIONS if name in old}
            if append == "sections":
                self.kept, self.data["commit"] = old["rows"], old["commit"]
                self.data["ceilings"] = old["ceilings"]
            elif append and old["commit"] == commit:
                self.kept, self.data["ceilings"] = old["rows"], old["ceilings"]
        self.errors = []

    def begin(self, section):
        self.sections[section] = {"commit": self.commit, "rows": []}

    def add_to(self, section, row):
        self.sections[section]["rows"].append(row)
        self.save()

    def add(self, case, row):
        self.data["rows"].append(row)
        self.kept = [old for old in self.kept if workloads.case_of(old) != case]
        self.save()

    def save(self):
        if self.path is None:
            return
        order = {case: i for i, case in enumerate(workloads.all_cases())}
        rows = self.kept + self.data["rows"]
        rows.sort(key=lambda row: order.get(workloads.case_of(row), len(order)))
        head = {key: value for key, value in self.data.items() if key != "rows"}
        if self.errors:
            head["errors"] = self.errors
        text = json.dumps(head, indent=1)[:-2] + f',\n "rows": {_list_of(rows)}'
        for name, section in self.sections.items():
            commit = json.dumps(section["commit"])
            text += f',\n "{name}": {{"commit": {commit}, "rows": {_list_of(section["rows"])}}}'
        text += "\n}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(text)
        temporary.replace(self.path)
