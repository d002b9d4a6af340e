"""The ops on a GPU: gpu_check.py runs these. Kernel times by CUDA graphs, beside the suite's."""
