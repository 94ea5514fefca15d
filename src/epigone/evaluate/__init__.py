"""Measuring models and texts; the theory to hold the measures against."""
