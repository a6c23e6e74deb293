"""Multi-scale deformable attention: module, CPU form, Triton kernels."""
