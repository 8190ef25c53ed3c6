"""The references: each op in JAX ops.

The kernels are tested against them, and they run where the kernels cannot. One module an op. A
function takes the arguments of its op and gives the same results, also for empty sequences, for
garbage in unused block-table entries and for NaN in unused slots of a page. Shapes:

  b         sequences                     s_q      queries a sequence
  h_q, h_kv query heads, KV heads         d_k, d_v head dims of K and of V (V: the first d_v of K)
  pages     pages in the pool             page     tokens a page
  mb        block-table entries a sequence
"""
