"""Which keys a query may see. Nothing here imports torch until a mask is asked for."""
