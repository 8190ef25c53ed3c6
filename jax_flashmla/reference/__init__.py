"""The references: each op in JAX ops.

The kernels are tested against them, and they run where the kernels cannot. There is one module for
each op. A function takes the arguments of its op and gives the same results, even for empty
sequences, garbage in unused block-table entries, and NaN in unused slots of a page. Shapes:

  b         sequences                     s_q      queries a sequence
  h_q, h_kv query heads, KV heads         d_k, d_v head dims of K and of V (V: the first d_v of K)
  pages     pages in the pool             page     tokens a page
  mb        block-table entries a sequence
"""
