"""What a student learns: divergences and objectives, as pure functions of arrays."""
