"""The C++ library: its sources, and the one place that loads it."""
