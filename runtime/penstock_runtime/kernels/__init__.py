"""Kernels for the CPU in C++: packed matrix products, norms, rotation, attention over pages.

    src/            C++ with a plain C interface, no headers of torch: compiles in seconds
    build.py        compiles it, once for each set of instructions (also at install)
    library.py      finds, checks and loads the library for this processor
    native.py       typed functions over torch tensors
    selection.py    the library or torch, by a worker's setting
    limits.py       what the processor can do at most, for benchmarks

Optional: without a compiler at install there is no library, and everything runs on torch.

**Batch-invariant by construction**: a row's result has the same bits whatever the other rows, the
chunks, the pages and the number of threads. See `src/tile.h` and `src/attention.cpp` for how.
"""
