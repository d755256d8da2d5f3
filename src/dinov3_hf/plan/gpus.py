"""GPUs by name, from public data sheets."""

from dataclasses import dataclass

from dinov3_hf.errors import ArgumentError, did_you_mean


@dataclass(frozen=True)
class GPU:
    """
    Args:
        tflops: peak of dense bfloat16 matrix products with float32 sums, in 10^12 operations a second. Data sheets
            that print twice as much count structured sparsity.
        memory_gb: in 10^9 bytes.
        memory_gb_per_second: bandwidth of that memory.
        link_gb_per_second: to the other GPUs of a node, one way: half of what is printed for both ways.
        network_gb_per_second: from node to node, one way, a GPU: of the vendor's reference system, else 100 Gb/s a
            node of 8.
        watts: thermal design power of a GPU alone.
    """

    tflops: float
    memory_gb: float
    memory_gb_per_second: float
    link_gb_per_second: float
    network_gb_per_second: float
    watts: float


GPUS = {
    # NVIDIA H100 data sheet, SXM; DGX H100: eight ports of 400 Gb/s.
    "h100-80gb": GPU(989, 80, 3350, 450, 50, 700),
    # NVIDIA H200 data sheet, SXM; DGX H200 as DGX H100.
    "h200-141gb": GPU(989, 141, 4800, 450, 50, 700),
    # NVIDIA DGX B200 data sheet: 1,440 GB for eight, of the 192 GB of memory that each has; 64 TB/s; 400 Gb/s a GPU.
    # HGX B200: 2.25 PFLOP/s dense at 1000 W.
    "b200-192gb": GPU(2250, 180, 8000, 900, 50, 1000),
    # NVIDIA A100 data sheet, SXM; DGX A100: eight ports of 200 Gb/s.
    "a100-80gb": GPU(312, 80, 2039, 300, 25, 400),
    "a100-40gb": GPU(312, 40, 1555, 300, 25, 400),
    # NVIDIA L40S data sheet: PCIe 4.0 x16, 64 GB/s both ways.
    "l40s-48gb": GPU(362, 48, 864, 32, 1.6, 350),
    # NVIDIA Ada GPU architecture white paper, appendix A (sums in float32); PCIe 4.0 x16.
    "rtx4090-24gb": GPU(165, 24, 1008, 32, 1.6, 450),
}


def find_gpu(name: str) -> GPU:
    """The GPU of this name.

    Raises:
        ArgumentError: there is none.
    """
    if name not in GPUS:
        raise ArgumentError(f"--gpu {name!r} is unknown; {did_you_mean(name, GPUS)}")
    return GPUS[name]
