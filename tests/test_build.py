"""What was built: the extension, its machine code, and the install that has neither."""

import functools
import importlib.util
import os
import re
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from jax_flashmla import _ffi

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the extension is for Linux")


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


def kernels_of(source):
    """The kernels that `source` defines; the name of its unnamed namespace holds the file's."""
    tag = source.replace(".", "_")
    return {name: code for name, code in sass().items() if tag in name}


def instructions(code):
    """The names of the instructions in `code`, without their modifiers."""
    pattern = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
    return set(re.findall(pattern, code, flags=re.MULTILINE))


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
    kernels = kernels_of("dense_decode.cu")
    assert kernels
    for name, code in kernels.items():
        assert {"HGMMA", "UTMALDG"} <= instructions(code), name


@pytest.mark.parametrize(
    "source", ["append_kv.cu", "combine.cu", "dense_decode.cu", "tile_scheduler.cu"]
)
def test_no_spills(source):
    kernels = kernels_of(source)
    assert kernels
    for name, code in kernels.items():
        assert not {"LDL", "STL"} & instructions(code), name


def test_no_local_memory():
    pattern = r"Function (\S+):\s+REG:\d+ STACK:(\d+).*? LOCAL:(\d+)"
    usage = re.findall(pattern, cuobjdump("-res-usage"))
    assert {name for name, _, _ in usage} == set(sass())
    assert {name for name, stack, local in usage if (stack, local) != ("0", "0")} == set()


def test_append_waits_for_the_kernel_before_it():
    for name, code in kernels_of("append_kv.cu").items():
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
