"""Looks into the report of a benchmark: every request was answered, with the tokens that were asked for."""

import json
import pathlib
import sys

kind, path = sys.argv[1], pathlib.Path(sys.argv[2])
if kind == "guidellm":
    reports = list(path.glob("guidellm-*.json"))
    assert len(reports) == 4, reports
    for report in reports:
        [benchmark] = json.loads(report.read_text())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        assert totals["successful"] == 8 and not totals["errored"], (report, totals)
        if "embeddings" not in report.name:
            tokens = benchmark["metrics"]["output_token_count"]["successful"]
            assert tokens["min"] == tokens["max"] == 8, (report, tokens)
else:
    reports = list(path.rglob("profile_export_aiperf.json"))
    assert len(reports) == 2, reports
    for report in map(json.loads, (report.read_text() for report in reports)):
        assert report["request_count"]["avg"] == 8 and not report.get("error_summary"), report
        assert report["time_to_first_token"]["avg"] > 0 and report["inter_token_latency"]["avg"] > 0
print(f"{kind} counts what was asked for")
