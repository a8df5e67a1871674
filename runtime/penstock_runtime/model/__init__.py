"""Architectures, shared layers and weights.

    registry.py      what each Hugging Face architecture consists of
    config.py        `ModelConfig`, read from a checkpoint's config.json (fields.py: typed reads)
    arithmetic.py    how many operations a prompt takes of each half of a layer
    rope.py          rotary position frequencies
    weights.py       `Checkpoint`: safetensors files, memory-mapped; `model_digest`
    operators.py     what layers are made of: torch's operators, or the C++ kernels'
    linear.py        multiplying by a weight matrix with what torch has
    fused.py         a device's kernels for norm, rotation and activation, where it has them
    layers.py        attention block, feed-forward, decoder layer
    loader.py        a stage's tensors by name and shape, made into layers
    transformer.py   `Transformer`: the layers [a, b) of a model, perhaps embedding and head

A stage reads `ModelConfig.from_directory(path)`, allocates its pool for `config.kv_layout(...)`,
calls `Transformer.load(path, config, layers=(a, b), ...)` and then `forward` once a step.
"""
