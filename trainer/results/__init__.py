"""Results of runs: records, groups, comparisons, plots."""
