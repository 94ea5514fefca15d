"""How much of its device a training uses: speed from one point of the curve to the next, beside the peak."""

import time
from dataclasses import dataclass, field

import jax

from epigone.devices import CHIPS


def peak_flops(mesh: jax.sharding.Mesh) -> float | None:
    """Dense bfloat16 FLOP/s of all devices of a mesh together; None where the table does not have them."""
    chip = CHIPS.get(mesh.devices.flat[0].device_kind)
    return None if chip is None else chip.flops * mesh.size


@dataclass
class Speed:
    """Speed between two points of the curve, of one process's run.

    Attributes:
        flops: floating-point operations of a step, as `Trained.flops` counts them: of student and teacher, padding
            included; neither recomputation nor the comparison of the two.
        peak: FLOP/s of the devices, or None.
    """

    flops: int
    peak: float | None
    _point: tuple[float, int, float] | None = field(default=None, init=False)

    def at_point(self, step: int, tokens: float) -> dict[str, float]:
        """tokens_per_second, flops_per_second and mfu since the last point; nothing at the first one.

        Model FLOPs utilisation is flops_per_second / peak (Chowdhery et al. 2022, PaLM, appendix B), absent where the
        peak is not known. Up to its first point a process also compiles, which is no speed of anything.
        """
        now, before = time.monotonic(), self._point
        self._point = (now, step, tokens)
        if before is None:
            return {}
        seconds = max(now - before[0], 1e-9)
        achieved = self.flops * (step - before[1]) / seconds
        rates = {"tokens_per_second": (tokens - before[2]) / seconds, "flops_per_second": achieved}
        return rates if self.peak is None else rates | {"mfu": achieved / self.peak}
