"""The constants that Python and CUDA both have are equal."""

import re
from pathlib import Path

import pytest

from jax_flashmla import _constants, _ffi, _split_kv, dense_decode

CUDA = Path(__file__).parent.parent / "cuda"

# CUDA's name -> the value in Python, or the name that it has in jax_flashmla._constants.
EQUAL = {
    "mla/shapes.cuh": {
        "kTileTokens": "TILE_TOKENS",
        "kTileRows": "ROW_TILE",
        "kQuarters": "SCALES_PER_ROW",
        "kHeadDimK": max(_split_kv.KERNEL_HEAD_DIMS_K),
        "kHeadDimV": _split_kv.KERNEL_HEAD_DIM_V,
        "kSms": _ffi.DEFAULT_SM_COUNT,
    },
    "split_kv/schedule.cuh": {
        "kSequenceOverhead": "SEQUENCE_OVERHEAD",
        "kAlignedTolerance": "ALIGNED_TOLERANCE",
        "kJoinedSplits": "JOINED_SPLITS",
        "kJoinCost": "JOIN_COST",
        "kJoinRows": "JOIN_ROWS",
        "kMaxMinPartTiles": "MAX_MIN_PART",
        "kMaxJoinWork": "MAX_JOIN_WORK",
        "kMaxJoinRows": "MAX_JOIN_ROWS",
        "kTotalCostLimit": "TOTAL_COST_LIMIT",
    },
    "split_kv/partial_result.cuh": {"kPartialsPerPart": "SPLITS_PER_PART"},
    "split_kv/work.cuh": {"kFlagsPerRowTile": "FLAGS_PER_ROW_TILE"},
    "split_kv/operands.h": {"kMaxBatch": "MAX_BATCH"},
    "sparse_decode/handler.cu": {"kMaxAxis": "MAX_LIST"},
    "dense_decode/handler.cu": {
        "kMinPage": min(dense_decode.KERNEL_PAGE_BLOCK_SIZES),
        "kMaxPage": max(dense_decode.KERNEL_PAGE_BLOCK_SIZES),
    },
}


def constants_of(file):
    """The integers that a CUDA file declares as constexpr, such as `kA = 64, kB = 1 << 17`."""
    text = (CUDA / file).read_text(encoding="utf-8")
    text = text.replace("std::numeric_limits<int32_t>::max()", str(2**31 - 1))
    found = {}
    for declaration in re.findall(r"^ *constexpr int(?:64_t)? (k[^;]+);", text, re.MULTILINE):
        for name, base, operator, other in re.findall(
            r"(k\w+) = (\d+)(?: (<<|/) (\d+))?(?:,|$)", declaration
        ):
            value = int(base)
            if operator == "<<":
                value <<= int(other)
            elif operator == "/":
                value //= int(other)
            found[name] = value
    return found


@pytest.mark.parametrize("file", EQUAL)
def test_python_and_cuda_have_the_same_constants(file):
    found = constants_of(file)
    for name, ours in EQUAL[file].items():
        value = getattr(_constants, ours) if isinstance(ours, str) else ours
        assert found.get(name) == value, name


def test_every_constant_of_the_package_is_compared():
    compared = {ours for constants in EQUAL.values() for ours in constants.values()}
    assert {name for name in vars(_constants) if name.isupper()} <= compared
