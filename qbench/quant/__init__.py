"""How numbers become codes and codes become bytes: encodings, grids, observers, the sweep, packing."""
