"""What a training step takes on devices that are not here: memory, time, exchange between devices, money."""
