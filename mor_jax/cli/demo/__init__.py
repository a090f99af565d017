"""`mor demo`: MoR and LoRA side by side on an embedded base, from data to a verified export; needs no download."""

from mor_jax.cli.demo.run import run_demo

__all__ = ["run_demo"]
