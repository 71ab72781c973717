"""Linear attention and short convolutions on one device.

:mod:`.attention` has the operation, :mod:`.backends` the table of its backends, each a module of
its own: :mod:`.torch`, :mod:`.triton`, :mod:`.fla` and :mod:`.reference`.
"""
