"""The two ops of one verify pass on a Mamba2 layer, each as torch reference and Triton kernel."""
