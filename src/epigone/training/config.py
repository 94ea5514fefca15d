"""What a training run is (part of a node's identity) and what it runs on (no part of it)."""

from dataclasses import dataclass, field

from epigone.errors import UserError
from epigone.models.rules import Sharding
from epigone.training.optimizer import Optimizer


@dataclass(frozen=True)
class Training:
    """How long, on how much at once, and with which optimizer.

    Attributes:
        steps: number of updates.
        batch_size: sequences an update, over all devices and micro-batches.
        sequence_length: tokens a sequence.
        optimizer: the optimizer and its learning rate.
        ema_decay: decay of the running average of the weights, which is then the result; None for the last weights.
        log_every: steps between two points of the recorded curve; each point is the mean since the one before.
        compare_every: points of the curve from one comparison with the teacher and the text to the next
            (`epigone.lessons.comparison`; 1: every point has one); None for none. It reads a batch once more with
            student and teacher, a large part of a step's time, and changes no result: so it is no part of identity.
    """

    steps: int = 200
    batch_size: int = 16
    sequence_length: int = 64
    optimizer: Optimizer = Optimizer()
    ema_decay: float | None = None
    log_every: int = 10
    compare_every: int | None = field(default=1, metadata={"identity": False})

    def __post_init__(self) -> None:
        _at_least_one("training", self, "steps", "batch_size", "sequence_length", "log_every", "compare_every")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise UserError(f"training: ema_decay={self.ema_decay} is outside [0, 1)")

    def is_point(self, step: int) -> bool:
        """Whether the curve has a point at this step: every `log_every` steps, and at the last."""
        return step % self.log_every == 0 or step == self.steps

    def compares(self, step: int) -> bool:
        """Whether the point at this step has a comparison; that at the last step always has one."""
        if self.compare_every is None or not self.is_point(step):
            return False
        return step == self.steps or step // self.log_every % self.compare_every == 0


@dataclass(frozen=True)
class Hardware:
    """The mesh, and how much of the work is kept against a crash. Changes no result beyond rounding.

    Attributes:
        data: devices over which the batch is cut, each with all weights.
        fsdp: devices over which the batch and the weights are cut.
        tensor: devices over which heads, feed-forward and vocabulary are cut.
        expert: devices over which the batch and the experts of mixtures are cut.
        student: the student's rules on this mesh: which axes of its arrays are cut over which of the mesh.
        teacher: those of every teacher beside it.
        microbatches: parts into which a batch is cut in time, to save memory.
        together: nodes of one shape that do not wait for each other and are trained in one program, at most: saves time
            where models are so small that a step is mostly the start of its operations, and takes the memory of all.
        offload_optimizer: keep the optimizer's moments in the memory of the host, from where they come for each update.
        checkpoint_every_seconds: time between two checkpoints; None for none by time.
        checkpoint_every_steps: steps between two checkpoints; None for none by steps.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    student: Sharding = Sharding()
    teacher: Sharding = Sharding()
    microbatches: int = 1
    together: int = 1
    offload_optimizer: bool = False
    checkpoint_every_seconds: float | None = 60.0
    checkpoint_every_steps: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Those of the mesh, along its axes as `models/sharding.py` has them."""
        return self.data, self.fsdp, self.tensor, self.expert

    def __post_init__(self) -> None:
        _at_least_one("hardware", self, "data", "fsdp", "tensor", "expert", "microbatches", "checkpoint_every_steps")
        _at_least_one("hardware", self, "together")
        if self.together > 1 and (max(self.sizes) > 1 or self.microbatches > 1 or self.offload_optimizer):
            raise UserError(
                f"hardware: together={self.together} is for small models on one device: leave out mesh, "
                "microbatches and offload_optimizer"
            )
        seconds = self.checkpoint_every_seconds
        if seconds is not None and seconds < 0:
            raise UserError(f"hardware: checkpoint_every_seconds={seconds} is negative: give a time, or None for none")


def _at_least_one(what: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{what}: {name}={value} must be at least 1")
