"""Loads the plugin for this repository, whether or not the package's entry point is installed."""

pytest_plugins = ["peftbench.plugin"]
