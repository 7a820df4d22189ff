"""Versions, the GPU, its driver and clocks, on the terminal: the summary shows them."""

import os
import platform
import shutil
import subprocess

import torch
from step import installed

from gpu.report import CUDA, DEVICE

PACKAGES = ("torch", "triton", "numpy", "numba", "pytest", "pytest-xdist", "hypothesis", "transformers", "tyro")
ASKED = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def main() -> None:
    print(f"- Python {platform.python_version()}, {os.cpu_count()} cores")
    print("- " + ", ".join(f"{name} {installed(name) or 'not installed'}" for name in PACKAGES))
    tools = ("nvcc", "gcc", "ncu")
    print("- " + ", ".join(f"{tool}: {'there' if shutil.which(tool) else 'not there'}" for tool in tools))
    if CUDA:
        gpu = torch.cuda.get_device_properties(DEVICE)
        print(
            f"- {gpu.name}, {gpu.multi_processor_count} SMs, {gpu.total_memory / 2**30:.1f} GiB, "
            f"L2 {gpu.L2_cache_size / 2**20:.0f} MiB, compute capability {gpu.major}.{gpu.minor}"
        )
        command = ["nvidia-smi", f"--query-gpu={ASKED}", "--format=csv"]
        if shutil.which(command[0]):
            print("- " + subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.replace("\n", "; "))


if __name__ == "__main__":
    main()
