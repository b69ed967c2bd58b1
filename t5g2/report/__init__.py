"""The report of a run or a sweep: workdir readers, statistics, tables, plots, the page."""
