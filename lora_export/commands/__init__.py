"""The verbs of the command line: name → ``module:attribute``, imported when the verb is called."""

COMMANDS: dict[str, str] = {
    "demo": "lora_export.commands.demo:demo",
    "inspect": "lora_export.commands.inspect:inspect",
    "merge": "lora_export.commands.merge:merge",
    "merge-onnx": "lora_export.commands.merge_onnx:merge_onnx",
    "run": "lora_export.commands.run:run",
}
