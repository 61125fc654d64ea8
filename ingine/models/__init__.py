"""Model definitions and loading: one lean decoder for the Llama-shaped families.

    load_model(path, *, dtype, device, backend) -> Decoder
    ModelConfig.from_folder(path) -> ModelConfig        (light: reads config.json, builds no weights)

    Decoder.config         ModelConfig
    Decoder.forward(input_ids [T], positions [T], kv_caches, metadata) -> hidden [T, hidden_size]
    Decoder.compute_logits(hidden [R, hidden_size]) -> float32 [R, vocab_size]
    Decoder.allocate_kv_caches(num_blocks, block_size) -> list[KVCache], one a layer
    Decoder.bytes_per_block(block_size) -> int, over all layers
"""
