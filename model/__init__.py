"""A decoder-only transformer, from scratch in Flax NNX. Read `transformer.py` first: it leads to all the rest."""
