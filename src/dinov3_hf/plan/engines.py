"""What each engine holds on a rank, and what it sends.

Letters: S parameters of the student, and as many of the teacher; R ranks; b bytes of a number in matrix products.
Parameters, gradients, AdamW's two moments and the teacher are float32: 4 bytes each. A Gram teacher is b bytes, under
ZeRO 4.

| | parameters | gradients | moments | teacher, Gram teacher |
|---|---|---|---|---|
| `ddp` | 4 S | 4 S | 8 S | 4 S, b B |
| `zero2` | 4 S | 4 S / R | (8 + 4) S / R, with a second copy of the parameters | 4 S, 4 B |
| `zero3` | 4 S / R | 4 S / R | 8 S / R in bf16, else (8 + 4) S / R | 4 S / R, 4 B / R |
| `fsdp2` | 4 S / R | 4 S / R | 8 S / R | 4 S / R, b B / R |
"""

from dataclasses import dataclass

from dinov3_hf.plan.workload import Workload

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
SHARDED = ("fsdp2", "zero3")  # parameters are, too

# Gradients that DeepSpeed gathers before it reduces them, as our configuration says, and parameters that it keeps
# gathered, its default.
DEEPSPEED_BUCKET = 50_000_000
DEEPSPEED_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class State:
    """Bytes on one rank, whatever the batch."""

    parameters: float
    gradients: float
    optimizer: float
    teacher: float
    gram_teacher: float
    buffers: float  # of communication: gathered parameters, buckets of gradients

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.teacher + self.gram_teacher + self.buffers


@dataclass(frozen=True)
class Engine:
    """
    Args:
        name: one of `ENGINES`.
        num_ranks: R, one a GPU.
    """

    name: str
    num_ranks: int

    @property
    def shares_parameters(self) -> bool:
        return self.name in SHARDED

    def state(self, workload: Workload) -> State:
        """What this rank holds."""
        S, b = workload.num_parameters, 2 if workload.bf16 else 4
        parameter_share = 1 / self.num_ranks if self.shares_parameters else 1.0
        state_share = 1.0 if self.name == "ddp" else 1 / self.num_ranks
        is_zero = self.name.startswith("zero")
        has_masters = self.name == "zero2" or (self.name == "zero3" and not workload.bf16)
        gram_teacher = (
            (4 if is_zero else b) * workload.backbone.num_parameters if workload.gram_teacher == "separate" else 0
        )
        return State(
            parameters=4 * S * parameter_share,
            gradients=4 * S * state_share,
            optimizer=(12 if has_masters else 8) * S * state_share,
            teacher=4 * S * parameter_share,
            gram_teacher=gram_teacher * parameter_share,
            buffers=self._buffers(workload, b),
        )

    def _buffers(self, workload: Workload, b: int) -> float:
        if self.num_ranks == 1:
            return 0.0
        if self.name == "ddp":
            return 4.0 * workload.num_parameters  # buckets, as large as the gradients
        if self.name == "fsdp2":
            width, block = workload.backbone.width, workload.backbone.block_parameters
            largest_head = max(head.num_parameters(width) for head in workload.heads)
            # Two blocks that are gathered, and two whose gradients are reduced in float32; or a head.
            return max(2 * (self._bytes_of_gathered_block(workload) + 4) * block, 1.0 * (b + 4) * largest_head)
        bucket = 4.0 * min(DEEPSPEED_BUCKET, workload.num_parameters)
        live = b * min(DEEPSPEED_LIVE_PARAMETERS, workload.num_parameters) if self.shares_parameters else 0
        return bucket + live

    def _bytes_of_gathered_block(self, workload: Workload) -> int:
        """Blocks of FSDP2 that are recomputed are gathered as they are."""
        return 2 if workload.bf16 and workload.recomputation == "none" else 4

    def rounded_weights(self, workload: Workload) -> float:
        """Bytes of copies of weights that autograd keeps for the backward pass of a forward."""
        backbone, b = workload.backbone, 2 if workload.bf16 else 4
        if self.shares_parameters and self.num_ranks > 1:
            # Gathered weights are let go and gathered again; what is joined from them stays.
            joins = self.name == "fsdp2" and workload.recomputation == "none"
            return b * backbone.joined_weights if joins else 0.0
        if b == 4:
            return 4.0 * backbone.joined_weights if workload.recomputation == "none" else 0.0
        heads = sum(head.weights(backbone.width) for head in workload.heads)
        # Autocast rounds each weight once a forward and keeps the copy until the forward has ended; blocks that are
        # recomputed selectively round theirs each time.
        return 2.0 * (heads if workload.recomputation == "selective" else backbone.matrix_weights + heads)

    def traffic(self, workload: Workload, num_forwards: int) -> float:
        """
        Bytes that a rank sends in an optimizer step, with rings: the (R - 1) / R of a tensor that is gathered or
        reduced to shards, twice that for a sum that everybody gets. Sums of losses and of Sinkhorn-Knopp are left out:
        a few megabytes.

        Args:
            num_forwards: forward passes of a step, on each rank.
        """
        S, B, b = workload.num_parameters, workload.backbone.num_parameters, 2 if workload.bf16 else 4
        ring = (self.num_ranks - 1) / self.num_ranks
        if self.name == "ddp":
            return ring * 2 * 4 * S
        if self.name == "zero2":
            return ring * (num_forwards * 4 * S + 4 * S)  # gradients at every backward, then parameters
        heads = b * workload.head_parameters
        student = (self._bytes_of_gathered_block(workload) if self.name == "fsdp2" else b) * B + heads
        gathered = 2 * student  # for forward and backward
        if workload.fixed_teacher is None:
            gathered += b * B + heads
        if workload.gram_teacher == "separate":
            gathered += b * B
        return ring * num_forwards * (gathered + 4 * S)
