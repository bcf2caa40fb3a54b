"""The operations of `cllm_gpu.ops.reference` under the same names, launching the CUDA kernels in `cuda/`.

The reference documents each operation; docstrings here state only differences. Each module checks arguments, chooses a
grid and launches; the mathematics is in the kernel of the same name. The first parameter of every operation is a
`Launcher`: for an NVIDIA GPU through CuPy, or for the simulator through NumPy.
"""
