"""The verbs of the command line: name → ``module:attribute``, imported when the verb is called."""

COMMANDS: dict[str, str] = {
    "demo": "lora_export.commands.demo:demo",
    "inspect": "lora_export.commands.inspect:inspect",
    "capture-onnx": "lora_export.commands.capture_onnx:capture_onnx",
    "merge": "lora_export.commands.merge:merge",
    "merge-onnx": "lora_export.commands.merge_onnx:merge_onnx",
    "swap-onnx": "lora_export.commands.swap_onnx:swap_onnx",
    "bank-onnx": "lora_export.commands.bank_onnx:bank_onnx",
    "quantize-onnx": "lora_export.commands.quantize_onnx:quantize_onnx",
    "convert-adapter": "lora_export.commands.convert_adapter:convert_adapter",
    "build-engine": "lora_export.commands.build_engine:build_engine",
    "bench": "lora_export.commands.bench:bench",
    "parity": "lora_export.commands.parity:parity",
    "verify": "lora_export.commands.verify:verify",
    "targets": "lora_export.commands.targets:targets",
    "doctor": "lora_export.commands.doctor:doctor",
    "run": "lora_export.commands.run:run",
}
