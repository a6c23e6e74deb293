"""Detect errors that mean a lack of GPU memory."""

from __future__ import annotations

import torch

_TEXTS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
)
"""Texts of torch's RuntimeErrors if a CUDA library has no memory for its workspace, or (the last one) for itself."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that device memory is full. CUDA libraries report it with their own texts."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)
