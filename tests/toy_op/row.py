# What goes to the end of tests/ops.py.  # ruff: noqa: F821
from jax_flashmla.scale_rows import scale_rows

from jax_flashmla import _ffi

if _ffi._C is not None:  # in place of the handler that a build would add; it is never run
    handler = _ffi._C.handlers()[APPEND]
    jax.ffi.register_ffi_target("jax_flashmla_scale_rows", handler, platform="CUDA")

ROWS.append(
    OpRow(
        name="scale-rows",
        primitive="scale_rows",
        operands=(
            Operand("x", "rows width", "float32", draw_values),
            Operand("factors", "rows", "float32", draw_values),
        ),
        results=(Result("rows width", "float32"),),
        call=scale_rows,
        expected=lambda x, factors: (x * factors[:, None],),
        assert_close=cases.assert_bit_equal,
        sizes={"rows": 3, "width": 8},
        targets={"jax_flashmla_scale_rows": 1},
        batch="rows",
        splits={"data": ("rows",)},
        gaps=(({"width": 6}, None, {}, "multiple of 4"),),
        symbolic=("rows",),
    )
)
