"""`make serve-check`: drafts that this project exports, loaded and served by vLLM on a CPU."""
