"""Results as text, pictures and pages: file ending → ``module:attribute``, imported when it is asked for."""

# Each takes (AdapterReport, path) and writes the picture of an adapter's spectra.
ADAPTER_PLOTS: dict[str, str] = {
    "html": "lora_export.reports.adapter.to_html:write_html",
    "png": "lora_export.reports.adapter.to_figure:write_figure",
    "svg": "lora_export.reports.adapter.to_figure:write_figure",
}
