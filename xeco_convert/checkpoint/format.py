"""What a converted folder is called by: the version of its format, and the files beside weights and configuration."""

FORMAT_VERSION = 1
REPORT_FILE = "xeco_report.json"
PAGE_FILE = "xeco_report.html"
EXPORT_REPORT_FILE = "xeco_export.json"
