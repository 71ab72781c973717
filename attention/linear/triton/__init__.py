"""The Triton kernels of linear attention.

:mod:`.backend` has the backend. One decay per head, without the delta rule, is computed by one
kernel in several roles: :mod:`.scalar` launches those of :mod:`.chunk_scan` and
:mod:`.decay_gradient`. Everything else is computed in stages, a kernel each, which :mod:`.stages`
launches: :mod:`.scores` (pairs of tokens of a chunk), :mod:`.states` (a scan over chunks),
:mod:`.outputs` and, in backward, :mod:`.gradients`.

All of them work on the pieces of :mod:`.pieces`, which never cross a document's edge.
"""
