"""`python -m jobs.report catalog.name=…`: a catalog as pages that a browser opens from disk."""

from jobs import _main
from jobs._show import console
from pipeline.config import ReportConfig
from pipeline.flows.report import Report, write_report


def job(config: ReportConfig) -> int:
    """Run the flow and say where the pages are."""
    console().print(summary(write_report(config)), markup=False, highlight=False, soft_wrap=True)
    return _main.DONE


def summary(report: Report) -> str:
    """Where it lies, and how large it is."""
    return "\n".join(
        [
            f"report    {report.index}",
            f"size      {report.num_features:,} features, {report.num_bytes / 1e6:.1f} MB in {report.num_files} files",
            f"time      {report.seconds:.1f} s",
        ]
    )


if __name__ == "__main__":
    _main.main("report", ReportConfig, job)
