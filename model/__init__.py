"""A decoder-only transformer, from scratch in Flax NNX. Read `transformer.py` first; it is short and leads to the rest."""
