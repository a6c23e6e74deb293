"""Multi-scale deformable attention: module, CPU implementation and Triton kernels."""
