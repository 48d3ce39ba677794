"""Quantise weights of a graph, one at a time, by ONNX Runtime's own quantisers: one file for each method."""

# Name that a user types → "module:method", imported when it is used.
METHODS: dict[str, str] = {
    "rtn": "lora_export.modes.quantising.methods.rtn:RTN",
    "k-quant": "lora_export.modes.quantising.methods.k_quant:K_QUANT",
    "hqq": "lora_export.modes.quantising.methods.hqq:HQQ",
}
