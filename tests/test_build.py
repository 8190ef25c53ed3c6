"""The build: the extension, its machine code, and a pure-Python install without either."""

import copy
import os
import re
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import machine_code
import pytest
from machine_code import cuobjdump, extension, instructions, readable, sass

from jax_flashmla import _ffi

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the extension is for Linux")


def kernels_of(name):
    """The machine code of each instance of the kernel template `name`."""
    found = {m: code for m, code in sass().items() if readable(m).partition("<")[0] == name}
    assert found, f"no kernel is named {name}"
    return found


def needed_libraries(path):
    """The DT_NEEDED entries of a 64-bit little-endian ELF file."""
    data = Path(path).read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    offset, size, count = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    dynamic = next(section for section in sections if section[1] == 6)  # SHT_DYNAMIC
    strings = sections[dynamic[6]][4]
    entries = struct.iter_unpack("<QQ", data[dynamic[4] : dynamic[4] + dynamic[5]])
    starts = [strings + value for tag, value in entries if tag == 1]  # DT_NEEDED
    return {data[start : data.index(b"\0", start)].decode() for start in starts}


def test_handlers_are_the_targets():
    handlers = extension().handlers()
    assert set(handlers) == set(_ffi.TARGETS)
    assert {type(handler).__name__ for handler in handlers.values()} == {"PyCapsule"}


def test_built_with_the_oldest_supported_headers():
    info = extension().build_info()
    assert info["ffi_api"] == (0, 3)  # jaxlib 0.10.2
    assert 13000 <= info["cudart"] < 14000


def test_links_to_the_c_library_alone():
    libraries = needed_libraries(extension().__file__)
    allowed = re.compile(r"(libc|libm|libdl|librt|libpthread|ld-linux-\S+)\.so\.\d+")
    assert {name for name in libraries if not allowed.fullmatch(name)} == set()


def test_machine_code_is_for_hopper_alone():
    assert set(re.findall(r"sm_\w+", cuobjdump("--list-elf"))) == {"sm_90a"}


def test_dense_decode_uses_tensor_cores_and_bulk_loads():
    for name, code in kernels_of("DenseDecodeKernel").items():
        assert {"HGMMA", "UTMALDG"} <= instructions(code).keys(), name


def test_no_spills():
    assert sass()
    for name, code in sass().items():
        assert not {"LDL", "STL"} & instructions(code).keys(), name


def test_no_local_memory():
    usage = machine_code.resources()
    assert usage.keys() == sass().keys()
    assert {name for name, used in usage.items() if used["STACK"] or used["LOCAL"]} == set()


def test_machine_code_is_that_of_the_table():
    complaint = machine_code.complaint(machine_code.read_table(), machine_code.figures())
    assert not complaint, complaint


def test_every_change_of_the_machine_code_is_seen(tmp_path):
    found = machine_code.figures()
    kernel = "DenseDecodeKernel<Config<__nv_bfloat16, 576, 0, 1>, false>"
    for key, old in found["kernels"][kernel].items():
        table = copy.deepcopy(found)
        table["kernels"][kernel][key] = old - 1
        (line,) = machine_code.differences(table, found)
        assert line == f"{kernel}: {key} {old - 1} -> {old}"
        assert line in machine_code.complaint(table, found)
    table = copy.deepcopy(found)
    table["kernels"]["Other"] = table["kernels"].pop(kernel)
    assert machine_code.differences(table, found) == [
        f"{kernel}: not in the table", "Other: no longer there",
    ]  # fmt: skip
    machine_code.write_table(found, tmp_path / "table.json")
    assert machine_code.read_table(tmp_path / "table.json") == found


def test_another_compiler_may_differ_a_little():
    rows = [{"instructions": count, "STL": spills} for count, spills in ((4000, 0), (4300, 1))]
    table = {"compiler": "13.0.88", "kernels": {"K": rows[0]}}
    found = {"compiler": "13.5.1", "kernels": {"K": rows[1]}}
    assert machine_code.differences(table, found) == ["K: STL 0 -> 1"]
    found["compiler"] = table["compiler"]
    assert len(machine_code.differences(table, found)) == 2


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN1a12_GLOBAL__N_11KI6__halfLi12ELb1EEEvNS0_1PE", "K<__half, 12, true>"),
        ("_ZN1a12_GLOBAL__N_11KILNS0_4KindE2E1TIjLin3EEEEvv", "K<2, T<uint32, -3>>"),
        ("_ZN1a1KEPKf", "K"),
    ],
)
def test_names_of_kernels_are_read(mangled, name):
    assert machine_code.readable(mangled) == name


def test_append_waits_for_the_kernel_before_it():
    for name, code in kernels_of("AppendKvKernel").items():
        loads = [match.start() for match in re.finditer(r"\b(LDG|LD)\.", code)]
        assert code.index("ACQBULK") < min(loads), name


def run_python(code, path):
    """Runs `code` in an interpreter that imports from `path` and from no editable install."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "JAX_PLATFORMS": "cpu",
        "JAX_FLASHMLA_PURE_PYTHON": "1",
    }
    command = [sys.executable, "-S", "-W", "error", "-c", code]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


USE_THE_FALLBACK = """
import importlib.util, jax, jax.numpy as jnp
import jax_flashmla
assert importlib.util.find_spec("jax_flashmla._C") is None, "has the extension"
cache = jax_flashmla.append_kv_cache(
    jnp.zeros((2, 16, 1, 576)), jnp.ones((1, 1, 576)), jnp.array([17], jnp.int32))
print(cache.sum(), cache[1, 1].sum())
"""


def test_pure_python_install(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--disable-pip-version-check", "--wheel-dir", tmp_path, ROOT],
        env=os.environ | {"JAX_FLASHMLA_PURE_PYTHON": "1"},
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    # A wheel is a zip file that Python can import from.
    output = run_python(USE_THE_FALLBACK, [wheel, sysconfig.get_path("purelib")])
    assert output.split() == ["576.0", "576.0"]
