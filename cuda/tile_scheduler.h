// Makes the tile schedule (mla.cuh); decode runs it too, where it is given none.
#pragma once

#include "ffi.h"

namespace jax_flashmla {

// Checks the shapes of the schedule, and launches the kernel that makes it. `rows`: the query rows
// of a request, those of all KV heads.
ffi::Error LaunchTileScheduler(cudaStream_t stream, I32<1> cache_seqlens, I32<2> part_bounds,
                               I32<1> first_part, I32<1> num_splits, int64_t rows);

}  // namespace jax_flashmla
