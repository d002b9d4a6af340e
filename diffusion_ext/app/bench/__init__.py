"""`bench`: what would I gain on this machine? eager, torch.compile, OpenVINO, ONNX Runtime and
diffusion_ext by turns."""
