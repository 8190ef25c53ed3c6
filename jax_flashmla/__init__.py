"""Multi-head latent attention (MLA) decode for JAX, with kernels for Hopper GPUs."""

from ._ffi import EXPORT_DISABLED_CHECKS
from .append import append_kv_cache, get_slot_mapping
from .cost import decode_cost
from .decode import flash_mla_with_kvcache
from .merge import merge_attention_states, merge_attention_states_across
from .schedule import TileSchedulerMetadata, get_mla_metadata
from .sparse_decode import get_sparse_seqlens, to_local_slots

__version__ = "0.1.0"

__all__ = [
    "EXPORT_DISABLED_CHECKS",
    "TileSchedulerMetadata",
    "__version__",
    "append_kv_cache",
    "decode_cost",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "get_slot_mapping",
    "get_sparse_seqlens",
    "merge_attention_states",
    "merge_attention_states_across",
    "to_local_slots",
]
