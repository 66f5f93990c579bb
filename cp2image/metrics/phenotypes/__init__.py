"""Ways through the space of profiles: moves, paths, typical cells, far-off vectors. Pure: numpy."""
