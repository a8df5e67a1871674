"""Attention over paged KV: the interface, then one backend a file.

base.py         the interface: `plan` once a forward pass, `run` once a layer
registry.py     which backend a device gets
slots.py        where a batch's own keys and values are written (shared)
page_table.py   a batch's pages in compressed rows, as GPU kernels take them
flashinfer.py   CUDA, 16-bit: kernels that read and write pages in place
paged_native.py CPU, the C++ kernels: reads pages in place
paged_cpu.py    CPU, without a compiler: gathered pages, flash attention, merge by logsumexp
dense.py        any device, CUDA's float32: gathered pages, masked scaled_dot_product_attention
reference.py    the definition in float32, for tests
"""
