"""Statistics of runs: exact percentiles, honest intervals, comparisons, steady state. Pure: no I/O, no clock.

percentiles  exact percentiles and the sample floor below which none is quoted
intervals    t over runs (the headline), ratios, order statistics
bootstrap    block bootstrap inside one run
compare      slower, faster, no difference, or cannot tell
steady       warm-up, stability, over-saturation
correlation  how many independent samples a correlated series is worth
queues       a single-server FIFO queue in vector form
"""

from corun.stats.bootstrap import block_bootstrap
from corun.stats.compare import (
    Comparison,
    Significance,
    Verdict,
    compare_runs,
    holm,
    paired_t_test,
    permutation_test,
    sign_flip_test,
    smallest_detectable,
    welch_test,
)
from corun.stats.correlation import autocorrelation, effective_size
from corun.stats.intervals import (
    Estimate,
    Interval,
    minimum_length,
    order_statistic_interval,
    percentile_interval,
    ratio_interval,
    replication_interval,
    t_interval,
)
from corun.stats.percentiles import (
    FLOORS,
    METHOD,
    PERCENTILES,
    Summary,
    percentile_of,
    percentiles_of,
    sample_floor,
    summarise,
)
from corun.stats.queues import mean_in_flight, poisson_arrivals, sojourn_times, waiting_times
from corun.stats.steady import (
    Saturation,
    Stability,
    Steady,
    Truncation,
    mser5,
    over_saturation,
    slope_test,
    steady_state,
    three_windows,
)

__all__ = [
    "FLOORS",
    "METHOD",
    "PERCENTILES",
    "Comparison",
    "Estimate",
    "Interval",
    "Saturation",
    "Significance",
    "Stability",
    "Steady",
    "Summary",
    "Truncation",
    "Verdict",
    "autocorrelation",
    "block_bootstrap",
    "compare_runs",
    "effective_size",
    "holm",
    "mean_in_flight",
    "minimum_length",
    "mser5",
    "order_statistic_interval",
    "over_saturation",
    "paired_t_test",
    "percentile_interval",
    "percentile_of",
    "percentiles_of",
    "permutation_test",
    "poisson_arrivals",
    "ratio_interval",
    "replication_interval",
    "sample_floor",
    "sign_flip_test",
    "slope_test",
    "smallest_detectable",
    "sojourn_times",
    "steady_state",
    "summarise",
    "t_interval",
    "three_windows",
    "waiting_times",
    "welch_test",
]
