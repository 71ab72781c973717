"""How keys and values reach the queries of other ranks: one schedule a module.

:mod:`.plan` has the data types of a plan, :mod:`.ring`, :mod:`.gather` and :mod:`.stripes` make its
stages, :mod:`.heads` says which heads a rank computes, :mod:`.names` has the registry, and
:mod:`.choose` picks the cheapest schedule. Nothing here imports torch before it is given a tensor,
except :mod:`.choose`.
"""
