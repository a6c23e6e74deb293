"""How a GPU says that its memory is full."""

from __future__ import annotations

import torch

_TEXTS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
)
"""What torch's RuntimeErrors say where a library of CUDA finds no room for its workspace, the last one for itself."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device's memory is full; libraries of CUDA say so in words of their own."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
