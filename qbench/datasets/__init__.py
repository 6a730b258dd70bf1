"""Datasets: three disjoint splits of one task, and the cache of decoded images."""
