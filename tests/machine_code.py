"""The machine code of the built extension, and the table of what it should hold.

    python tests/machine_code.py              prints what differs from the table
    python tests/machine_code.py --update     writes the table anew, machine_code.json

Commit a change of the table together with its cause, and explain it in the commit.
"""

import argparse
import collections
import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

TABLE = Path(__file__).with_name("machine_code.json")
COUNTED = ("HGMMA", "UTMALDG", "LDL", "STL")
# How much a figure that is not 0 may differ with another compiler.
OTHER_COMPILER = 0.1


def extension():
    from jax_flashmla import _C

    return _C


def cuobjdump(*options):
    """What cuobjdump says of the extension."""
    roots = importlib.util.find_spec("nvidia").submodule_search_locations
    tools = [tool for root in roots for tool in Path(root).glob("cu13/bin/cuobjdump")]
    command = [tools[0], *options, extension().__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def sass():
    """The machine code of each kernel: {mangled name: text}."""
    pieces = re.split(r"^\s*Function : (\S+)$", cuobjdump("--dump-sass"), flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def instructions(code):
    """How often each instruction occurs in `code`, without modifiers and padding."""
    pattern = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    counts = collections.Counter(re.findall(pattern, code, flags=re.MULTILINE))
    del counts["NOP"]
    return counts


def resources():
    """Bytes and registers of each kernel: {mangled name: {"REG": .., "STACK": .., ...}}."""
    lines = re.findall(r"Function (\S+):\s+(REG:.*)$", cuobjdump("-res-usage"), re.MULTILINE)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", text)} for name, text in lines}


def compiler():
    """The version of ptxas that made the machine code."""
    versions = set(re.findall(r"Tool Version: .*\bV([\d.]+)", cuobjdump("--dump-elf")))
    return ", ".join(sorted(versions))


BUILTIN = {"b": "bool", "h": "uint8", "t": "uint16", "j": "uint32", "i": "int", "f": "float"}


class Demangler:
    """Reads the part of the Itanium C++ ABI's names that kernels have: `Name<types, numbers>`."""

    def __init__(self, text):
        self.text, self.at = text, 0

    def take(self, pattern):
        match = re.compile(pattern).match(self.text, self.at)
        if match is None:
            raise ValueError(f"{self.text!r} is not understood from {self.text[self.at :]!r} on")
        self.at = match.end()
        return match[0]

    def next_is(self, pattern):
        return re.compile(pattern).match(self.text, self.at) is not None

    def nested(self):
        """The last name of N..E, with its template arguments."""
        name = ""
        self.take("N")
        while not self.next_is("E"):
            if self.next_is(r"S[0-9A-Z]*_"):  # what was named before, a namespace
                self.take(r"S[0-9A-Z]*_")
            elif self.next_is("I"):
                name += self.arguments()
            else:
                name = self.identifier()
        self.take("E")
        return name

    def identifier(self):
        length = int(self.take(r"\d+"))
        self.at += length
        return self.text[self.at - length : self.at]

    def arguments(self):
        found = []
        self.take("I")
        while not self.next_is("E"):
            found.append(self.literal() if self.next_is("L") else self.type())
        self.take("E")
        return f"<{', '.join(found)}>"

    def type(self):
        if self.next_is("N"):
            return self.nested()
        if self.next_is(r"\d"):
            return self.identifier() + (self.arguments() if self.next_is("I") else "")
        letter = self.take("[a-z]")
        return BUILTIN.get(letter, letter)

    def literal(self):
        self.take("L")
        kind = self.type()
        value = self.take(r"n?\d+").replace("n", "-")
        self.take("E")
        return {"0": "false", "1": "true"}[value] if kind == "bool" else value


def readable(mangled):
    """A kernel's name without namespaces and parameters: `CombineKernel<__half, 1, true>`."""
    demangler = Demangler(mangled)
    demangler.take("_Z")
    return demangler.nested()


def figures():
    """The table for the extension as it is built."""
    used, kernels = resources(), {}
    for mangled, code in sass().items():
        name, usage, counts = readable(mangled), used[mangled], instructions(code)
        if name in kernels:
            raise ValueError(f"two kernels have the name {name}")
        kernels[name] = {
            "registers": usage["REG"],
            "stack": usage["STACK"],
            "local": usage["LOCAL"],
            "shared": usage["SHARED"],
            "instructions": counts.total(),
            **{instruction: counts[instruction] for instruction in COUNTED},
        }
    return {"compiler": compiler(), "kernels": dict(sorted(kernels.items()))}


def read_table(path=TABLE):
    return json.loads(path.read_text())


def write_table(found, path=TABLE):
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in found["kernels"].items()]
    head = f'{{\n "compiler": {json.dumps(found["compiler"])},\n "kernels": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n }\n}\n")


def differences(table, found):
    """How `found` differs from `table`, one line for each difference.

    The compiler that made the table must give exactly its figures; another one may differ a little.
    """
    tolerance = 0 if table["compiler"] == found["compiler"] else OTHER_COMPILER
    lines = []
    for name in sorted(table["kernels"].keys() | found["kernels"].keys()):
        old, new = table["kernels"].get(name), found["kernels"].get(name)
        if old is None or new is None:
            lines.append(f"{name}: {'not in the table' if old is None else 'no longer there'}")
            continue
        changed = [key for key in new if abs(new[key] - old.get(key, -1)) > tolerance * new[key]]
        lines += [f"{name}: {key} {old.get(key)} -> {new[key]}" for key in changed]
    return lines


def complaint(table, found):
    """The differences as text that says what to do; empty if there are none."""
    lines = differences(table, found)
    if not lines:
        return ""
    return "\n".join([
        f"the machine code is not what {TABLE.name} says (old -> new; compilers "
        f"{table['compiler']} -> {found['compiler']}):", *lines,
        "If that is intended: python tests/machine_code.py --update, and say why in the commit.",
    ])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name} anew")
    options = parser.parse_args()
    found = figures()
    table = read_table() if TABLE.exists() else {"compiler": "none", "kernels": {}}
    print(complaint(table, found) or "as the table says")
    if options.update:
        write_table(found)
        print(f"wrote {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
