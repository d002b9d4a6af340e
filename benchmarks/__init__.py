"""What diffusion_ext costs beside what it replaces: see docs/benchmarks.md."""
