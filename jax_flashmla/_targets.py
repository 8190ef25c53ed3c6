"""The FFI targets: the names by which programs call the kernels, one line a handler.

The build reads this list too: for each name there is a handler of that name in cuda/.
"""

TARGETS = (
    "jax_flashmla_append_kv",
    "jax_flashmla_dense_decode",
    "jax_flashmla_schedule_and_decode",
    "jax_flashmla_tile_scheduler",
)
