"""How keys and values reach the queries of other ranks: one schedule a module."""
