"""What each engine holds on a rank, and what it sends.

Letters: S parameters of the student, and as many of the teacher; R ranks; b bytes of a number in matrix products.
Parameters, gradients, AdamW's two moments and the teacher are float32: 4 bytes each. A Gram teacher is b bytes.

| | parameters | gradients | moments | teacher, Gram teacher |
|---|---|---|---|---|
| `ddp` | 4 S | 4 S | 8 S | 4 S, b B |
| `zero2` | 4 S | 4 S / R | (8 + 4) S / R, with a second copy of the parameters | 4 S, b B |
| `zero3` | 4 S / R | 4 S / R | (8 + 4) S / R | 4 S / R, b B / R |
| `fsdp2` | 4 S / R | 4 S / R, and 4 S while gradients of several micro-batches add up | 8 S / R | 4 S / R, b B / R |
"""

from dataclasses import dataclass

from dinov3_hf.plan.workload import Workload

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
SHARDED = ("fsdp2", "zero3")  # parameters are, too

# DeepSpeed's defaults: gradients that it gathers before it reduces them, and parameters that it keeps gathered.
DEEPSPEED_BUCKET = 500_000_000
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

    def state(self, workload: Workload, accumulates: bool) -> State:
        """
        Args:
            accumulates: whether gradients of several forward passes are added up before the optimizer moves.
        """
        S, b = workload.num_parameters, 2 if workload.bf16 else 4
        parameter_share = 1 / self.num_ranks if self.shares_parameters else 1.0
        state_share = 1.0 if self.name == "ddp" else 1 / self.num_ranks
        gradients = 4 * S * state_share
        if self.name == "fsdp2" and accumulates:
            gradients += 4 * S
        gram_teacher = b * workload.backbone.num_parameters if workload.gram_teacher == "separate" else 0
        return State(
            parameters=4 * S * parameter_share,
            gradients=gradients,
            optimizer=(12 if self.name.startswith("zero") else 8) * S * state_share,
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
            # Two blocks that are gathered, and two whose gradients are reduced in float32; or a head, in float32.
            return max(2 * (b + 4) * block, 2.0 * 4 * largest_head)
        bucket = 4.0 * min(DEEPSPEED_BUCKET, workload.num_parameters)
        live = b * min(DEEPSPEED_LIVE_PARAMETERS, workload.num_parameters) if self.shares_parameters else 0
        return bucket + live

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
        head_bytes = 4 if self.name == "fsdp2" else b
        network = b * B + head_bytes * workload.head_parameters
        gathered = 2 * network + network  # the student's for forward and backward, the teacher's
        if workload.gram_teacher == "separate":
            gathered += b * B
        num_reductions = 1 if self.name == "fsdp2" else num_forwards
        return ring * (num_forwards * gathered + num_reductions * 4 * S)
