"""Models × data sets × tasks in one run: settings, rows, vectors, tasks, comparisons, subgroups, leakage, one page."""
