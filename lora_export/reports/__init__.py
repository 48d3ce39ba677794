"""Show results as text, pictures and pages.

`REPORTS` lists what can be written to a file: kind of result → ending of the file → ``module:attribute``,
imported when a report is requested. Each function takes the result and returns the file's content, text or
bytes. A new form of report is a module and a line here.
"""

_PARITY, _BENCH, _ADAPTER = (f"lora_export.reports.{kind}" for kind in ("parity", "bench", "adapter"))

REPORTS: dict[str, dict[str, str]] = {
    # Of `lora_export.parity.result.ParityReport`.
    "parity": {
        "json": f"{_PARITY}.to_json:report_json",
        "html": f"{_PARITY}.to_html:report_html",
        "xml": f"{_PARITY}.to_junit:junit_xml",
        "md": f"{_PARITY}.to_markdown:report_markdown",
        "txt": f"{_PARITY}.to_text:report_text",
    },
    # Of `lora_export.bench.result.BenchReport`.
    "bench": {
        "json": f"{_BENCH}.to_json:report_json",
        "html": f"{_BENCH}.to_html:report_html",
        "md": f"{_BENCH}.to_markdown:report_markdown",
        "txt": f"{_BENCH}.to_text:report_text",
        "png": f"{_BENCH}.to_figure:report_png",
        "svg": f"{_BENCH}.to_figure:report_svg",
    },
    # Of `lora_export.reports.adapter.facts.AdapterReport`.
    "adapter": {
        "json": f"{_ADAPTER}.to_json:report_json",
        "html": f"{_ADAPTER}.to_html:report_html",
        "md": f"{_ADAPTER}.to_markdown:report_markdown",
        "txt": f"{_ADAPTER}.to_text:report_text",
        "png": f"{_ADAPTER}.to_figure:report_png",
        "svg": f"{_ADAPTER}.to_figure:report_svg",
    },
}
# Endings whose reports need matplotlib.
PICTURES = ("png", "svg")
