"""One trainer on a mesh, its optimizer, its checkpoints and its metrics."""
