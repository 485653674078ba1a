"""The ops as Triton kernels, for NVIDIA and AMD GPUs; one file per op, named as the op's own.

Under TRITON_INTERPRET=1 they run on CPU tensors, slowly, which is how the tests run them without a
GPU. Importing this package does not import triton; its modules do.

Conventions: offsets are int64; numbers that change from call to call (coefficients, lengths) are
arguments that nothing is specialized on; a scan runs forward over reversed addresses; partial sums
are merged by a kernel of their own, in a fixed order, so that results do not vary.
"""
