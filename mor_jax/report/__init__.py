"""Pictures of runs."""

from mor_jax.report.plots import plot_curves, plot_routing, read_metrics

__all__ = ["plot_curves", "plot_routing", "read_metrics"]
