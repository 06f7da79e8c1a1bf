"""The VAE's own tiles, spread over the ranks and put together by its own code."""
