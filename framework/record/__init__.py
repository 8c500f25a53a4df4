"""What is kept of a run: run.json, report.html, and the readers of its log, for the terminal and for comparisons."""
