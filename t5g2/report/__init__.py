"""The report of a run or a sweep: reading workdirs, statistics, tables, plots, the page."""
