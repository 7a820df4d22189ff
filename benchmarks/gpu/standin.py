"""Triton's own way to a launch with a driver that has no GPU: kernels are compiled for sm_90, and nothing runs them.

Importing it makes the Triton backend serve CPU tensors: a dry run of what the host does.
"""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import ademamix.backends


class Utils:
    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 2, 64, 0, 1024  # module, function, registers, spilt ones, threads

    def get_device_properties(self, _: Any) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def unload_module(self, _: Any) -> None:
        pass


class Launcher:
    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *_: Any) -> None:
        pass


class Driver:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _: Any) -> None:
        pass

    def get_current_stream(self, _: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, _: Any) -> str:
        return "int"


triton.runtime.driver.set_active(Driver())
ademamix.backends.choose = lambda backend, device: "triton"  # type: ignore[assignment]
