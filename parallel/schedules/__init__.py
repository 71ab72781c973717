"""How keys and values reach the queries of other ranks: one schedule a module.

:mod:`.plan` has the data types of a plan, :mod:`.ring`, :mod:`.gather` and :mod:`.stripes` make its
stages from the parts that they share: :mod:`.halo`, :mod:`.near_far` and :mod:`.ranges`.
:mod:`.heads` says which heads a rank computes, :mod:`.names` has the registry, :mod:`.balance`
counts the work of each rank, and :mod:`.choose` picks the cheapest schedule and makes its plan.
Nothing here imports torch before it is given a tensor.
"""
