"""The FFI targets: the names by which programs call the kernels, one line a handler.

The build reads this list too. Each name is that of a handler in cuda/.
"""

TARGETS = (
    "jax_flashmla_append_kv",
    "jax_flashmla_dense_decode",
    "jax_flashmla_schedule_and_decode",
    "jax_flashmla_sparse_decode",
    "jax_flashmla_tile_scheduler",
)
