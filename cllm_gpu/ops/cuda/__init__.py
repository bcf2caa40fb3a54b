"""The operations of `cllm_gpu.ops.reference` by the same names, launching the CUDA kernels in `cuda/`.

The reference says what each one does; here stands what differs. A file checks its arguments, chooses a grid and
launches; the mathematics is in the kernel of the same name. The first parameter of every operation is a `Launcher`: on
an NVIDIA GPU through CuPy, or on the simulator through NumPy.
"""
