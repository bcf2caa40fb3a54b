"""The operations in C++ for the CPU, single-threaded and vectorised; `cllm_gpu.training.data_parallel` adds threads.

The mathematics is in `csrc/`; the modules here check arguments and call it. The first parameter of every operation is a
`Library`. An array of unsupported dtype, shape or strides raises a ValueError that names the argument; there is no
slower fallback.
"""
