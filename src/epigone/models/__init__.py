"""Models: one Flax decoder whose families are data, and count-based n-gram models."""
