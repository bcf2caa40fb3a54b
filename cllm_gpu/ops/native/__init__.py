"""The operations in C++ for the CPU: single-threaded, vectorised; threads come from `cllm_gpu.training.data_parallel`.

`csrc/` holds the mathematics; the modules here check their arguments, call, and hold no mathematics. The first
parameter of every operation is a `Library`. An array that an operation cannot take (dtype, shape, strides) is a
ValueError that names the argument, never a slower path.
"""
