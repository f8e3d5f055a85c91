"""A model in, an artifact out. Nothing is built here yet; the folder keeps its place in the layers."""
