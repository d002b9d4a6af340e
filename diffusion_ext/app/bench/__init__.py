"""`bench`: what would I gain on this machine? eager, torch.compile and diffusion_ext by turns."""
