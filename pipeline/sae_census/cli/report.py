"""`sae-census report catalog.name=…`: a catalog as pages that a browser opens from disk."""

from sae_census.cli import command
from sae_census.cli.show import console
from sae_census.config import ReportConfig
from sae_census.flows.catalog.report import Report, write_report


def job(config: ReportConfig) -> int:
    """Run the flow and say where the pages are."""
    console().print(summary(write_report(config)), markup=False, highlight=False, soft_wrap=True)
    return command.DONE


def summary(report: Report) -> str:
    """Where it lies, and how large it is."""
    return "\n".join(
        [
            f"report    {report.index}",
            f"size      {report.num_features:,} features, {report.num_bytes / 1e6:.1f} MB in {report.num_files} files",
            f"time      {report.seconds:.1f} s",
        ]
    )


def main() -> None:
    """`sae-census report`: take overrides from the command line, print what came out, and exit with its code."""
    command.main("report", ReportConfig, job)
