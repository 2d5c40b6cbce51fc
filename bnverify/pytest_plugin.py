"""The pytest plugin. pytest loads it in every run, so it imports neither jax nor hypothesis."""
