"""Trainers that `train_step.py` sets side by side: each file makes one kind, in a process of its own."""
